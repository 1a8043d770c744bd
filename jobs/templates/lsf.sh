{% extends "job.sh" %}
{% block directives %}
#BSUB -J {{ job.name }}
{% if launcher == "jsrun.sh" %}
#BSUB -nnodes {{ job.nodes }}
{% else %}
#BSUB -n {{ job.slots }}
#BSUB -R "span[ptile={{ job.cpus_per_node }}]{% if job.constraint %} select[{{ job.constraint }}]{% endif %}"
{% if job.gpus_per_node %}
#BSUB -gpu "num={{ job.gpus_per_node }}"
{% endif %}
{% endif %}
#BSUB -W {{ time }}
#BSUB -wa URG
#BSUB -wt {{ job.stop_minutes }}
#BSUB -Q 75
#BSUB -r
#BSUB -o job-%J.lsf
{% if job.partition %}
#BSUB -q {{ job.partition }}
{% endif %}
{% if job.account %}
#BSUB -P {{ job.account }}
{% endif %}
{% for directive in directives %}
#BSUB {{ directive }}
{% endfor %}
{% endblock %}
{% block output %}
# LSF delivers a job's output at its end, and loses that of a job that it queues again; this file can be watched.
exec >>"$run/job-$LSB_JOBID.out" 2>&1
{% endblock %}
{% block identity %}
job=$LSB_JOBID restart=0
end=$(($(date +%s) + {{ job.seconds }}))
# LSF queues the same job again, and does not count.
starts=$run/.job-$job.starts
[ ! -s "$starts" ] || restart=$(wc -l <"$starts")
echo "$HOSTNAME" >>"$starts" || die "cannot write into $run"
{% endblock %}
{% block again %}
    say "queued again"
    exit 75
{% endblock %}
