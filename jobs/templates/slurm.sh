{% extends "job.sh" %}
{% block directives %}
#SBATCH --job-name={{ job.name }}
#SBATCH --nodes={{ job.nodes }}
{% if job.oversubscribe %}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ job.cpus_per_node }}
{% else %}
#SBATCH --ntasks-per-node={{ job.ranks_per_node }}
#SBATCH --cpus-per-task={{ job.threads }}
{% endif %}
#SBATCH --time={{ time }}
#SBATCH --output=job-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{{ job.stop_seconds }}
{% if job.partition %}
#SBATCH --partition={{ job.partition }}
{% endif %}
{% if job.account %}
#SBATCH --account={{ job.account }}
{% endif %}
{% if job.qos %}
#SBATCH --qos={{ job.qos }}
{% endif %}
{% if job.constraint %}
#SBATCH --constraint={{ job.constraint }}
{% endif %}
{% if job.gpus_per_node and site.gpu_request == "gpus-per-node" %}
#SBATCH --gpus-per-node={{ job.gpus_per_node }}
{% elif job.gpus_per_node and site.gpu_request == "gres" %}
#SBATCH --gres=gpu:{{ job.gpus_per_node }}
{% endif %}
{% for directive in directives %}
#SBATCH {{ directive }}
{% endfor %}
{% endblock %}
{% block identity %}
job=$SLURM_JOB_ID restart=${SLURM_RESTART_COUNT:-0} end=${SLURM_JOB_END_TIME:-}
if [ -z "$end" ]; then
    # Slurm before 23.02.
    clock=$(squeue -h -j "$job" -o %e 2>/dev/null)
    [ -z "$clock" ] || end=$(date -d "$clock" +%s 2>/dev/null)
fi
: "${end:=$(($(date +%s) + {{ job.seconds }}))}"
{% endblock %}
{% block again %}
    # A job that is cancelled, or whose time is over, must not come back.
    state=$(squeue -h -j "$job" -o %T 2>/dev/null)
    case $state in
    RUNNING | '')
        say "submitting the job again"
        trap - TERM
        # It ends this shell.
        scontrol requeue "$job" && sleep 300
        say "Slurm did not take the job again; \`mpillm submit … --resume\` continues it"
        ;;
    *) say "the job is $state, so it is not submitted again; \`mpillm submit … --resume\` continues it" ;;
    esac
{% endblock %}
