{% extends "job.sh" %}
{% block directives %}
#PBS -N {{ job.name }}
#PBS -l select={{ job.nodes }}:ncpus={{ job.cpus_per_node }}:mpiprocs={{ job.ranks_per_node }}:ompthreads={{ job.threads }}{% if job.gpus_per_node %}:ngpus={{ job.gpus_per_node }}{% endif %}{% if job.constraint %}:{{ job.constraint }}{% endif %}

#PBS -l place=scatter
#PBS -l walltime={{ time }}
#PBS -j oe
#PBS -r y
{% if job.partition %}
#PBS -q {{ job.partition }}
{% endif %}
{% if job.account %}
#PBS -A {{ job.account }}
{% endif %}
{% for directive in directives %}
#PBS {{ directive }}
{% endfor %}
{% endblock %}
{% block output %}
# PBS delivers a job's output at its end; this file can be watched.
exec >>"$run/job-$PBS_JOBID.out" 2>&1
{% endblock %}
{% block identity %}
job=$PBS_JOBID restart=${MPILLM_JOB_RESTART:-0}
case $restart in *[!0-9]*) restart=0 ;; esac
end=$(($(date +%s) + {{ job.seconds }}))
{% endblock %}
{% block timer %}
# PBS sends no signal before the end, so the script sends it to itself.
{
    trap 'kill "$sleeper"; exit' TERM
    left=$((end - $(date +%s) - {{ job.stop_seconds }}))
    sleep $((left > 0 ? left : 0)) &
    sleeper=$!
    wait "$sleeper" && kill -USR1 $$
} >/dev/null 2>&1 &
timer=$!
{% endblock %}
{% block early %}
    kill "$timer" 2>/dev/null
{% endblock %}
{% block after %}
kill "$timer" 2>/dev/null
{% endblock %}
{% block again %}
    if next=$(cd -- "$run" && qsub -v "MPILLM_JOB_RESTART=$((restart + 1))" job.sh); then
        say "submitted again, as job $next"
        case $next in
        *[!A-Za-z0-9._-]*) ;;
        *)
            sed -e "s/^ \"id\": .*/ \"id\": \"$next\",/" -e "/^ \"output\": /s/job-[^\/]*\.out\"/job-$next.out\"/" \
                "$run/job.json" >"$run/.job.json.$job" && mv -- "$run/.job.json.$job" "$run/job.json"
            ;;
        esac
    else
        say "PBS did not take the job again (some sites allow qsub on login nodes only); \`mpillm submit … --resume\` continues it"
    fi
{% endblock %}
