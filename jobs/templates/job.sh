#!/bin/bash
{% block directives %}{% endblock %}
# Written by `mpillm submit`; docs/batch.md explains each step.
set -u
run={{ job.run }}
folder={{ job.folder }}
max_restarts={{ job.max_restarts }}
{% block output %}{% endblock %}

say() {
    printf '[%s] %s\n' "$(date '+%F %T')" "$1"
}

die() {
    say "$1" >&2
    exit 1
}

# A trapped signal ends `wait` early, so each is counted. None is sent to a launcher that has not begun.
signals=0 taken='' step=''
ask_to_stop() {
    signals=$((signals + 1))
    say "$1: asking the ranks to save and stop"
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
time_is_up() {
    ask_to_stop "the time limit is near"
}
taken_away() {
    taken=yes
    ask_to_stop "the batch system ends the job"
}
trap time_is_up {{ limit_signals }}
trap taken_away TERM

# Sets job (its number), restart (how often it ran before) and end (of its wall time, in unix seconds).
{% block identity %}{% endblock %}
say "job $job on $HOSTNAME, start $((restart + 1)), until $(date -d "@$end" '+%F %T')"
cd -- "$folder" || die "cannot enter $folder, where the job was submitted; it must be on a file system of this node too"

{% if site.modules %}
# The scripts of module systems read variables that are not set.
set +u
for init in "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash" /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
    if ! command -v module >/dev/null && [ -r "$init" ]; then
        # shellcheck source=/dev/null
        . "$init"
    fi
done
{% for module in modules %}
module load {{ module }} || die "the module {{ module }} cannot be loaded; mend modules in the site file"
{% endfor %}
set -u

{% endif %}
{% if site.environment %}
environment={{ site.environment }}
[ -x "$environment/bin/python" ] || die "there is no Python in $environment on this node; mend environment in the site file"
export PATH="$environment/bin:$PATH"
{% endif %}
export OMP_NUM_THREADS={{ job.threads }} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export MPILLM_JOB_END="$end" MPILLM_JOB_RESTART="$restart"
{% if plugin %}
export MPILLM_SCHEDULER={{ plugin }}
{% endif %}
{% if job.hdf5_file_locking %}
export HDF5_USE_FILE_LOCKING={{ job.hdf5_file_locking }}
{% endif %}
{% for name, value in site.variables.items() %}
export {{ names[name] }}={{ value }}
{% endfor %}

# Sets launch, which starts all ranks, and each_node, which starts one process a node.
{% include launcher %}

command=({% for word in job.command %}{{ word }} {% endfor %})
{% if job.stage %}
{% include "staging.sh" %}
{% endif %}

{% block timer %}{% endblock %}

# What an earlier job left must not be taken for the outcome of this one.
outcome_stamp() {
    stat -c '%i %z' -- "$run/outcome" 2>/dev/null
}
before=$(outcome_stamp)
if [ "$signals" -ne 0 ]; then
{% if job.stage %}
    unstage
{% endif %}
{% block early %}{% endblock %}
    die "the job's time ended before training began; ask for more with --time"
fi
"${launch[@]}" "${command[@]}" &
step=$!
while
    seen=$signals
    wait "$step"
    code=$?
    [ "$signals" -ne "$seen" ]
do
    :
done
step=''
trap '' {{ limit_signals }}
{% block after %}{% endblock %}
outcome=unknown
if [ "$(outcome_stamp)" != "$before" ]; then
    outcome=$(cat -- "$run/outcome")
fi
say "training ended with exit code $code, and reports: $outcome"
{% if job.stage %}
unstage
{% endif %}

# A launcher's exit code may be wrong, so the run's own outcome counts: 0 finished, 75 to be continued.
case $outcome in
finished) exit 0 ;;
stopped) ;;
*)
    [ "$code" -ne 0 ] || code=1
    [ "$code" -eq 75 ] || exit "$code"
    ;;
esac
if [ -n "$taken" ]; then
    say "the batch system ended the job, so it is not submitted again; \`mpillm submit … --resume\` continues it"
elif [ "$restart" -ge "$max_restarts" ]; then
    say "the job was started $max_restarts times more, as --max-restarts allows; \`mpillm submit … --resume\` continues it"
else
{% block again %}{% endblock %}
fi
# The script's own exit code.
(exit {{ given_up }})
