launcher=$(command -v {{ program }}) || die "there is no {{ program }} on PATH; name the MPI's module in the site file's modules"
{% if scheduler == "slurm" %}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
{% elif hosts_variable %}
mapfile -t hosts < <(awk '!seen[$0]++' "${{ hosts_variable }}")
{% else %}
hosts=("$HOSTNAME")
{% endif %}
{% if job.stage or scheduler != "" %}host_list=$(IFS=,; echo "${hosts[*]}"){% endif %}

slot_list=$(IFS=,; echo "${hosts[*]/%/:{{ job.ranks_per_node }}}")
# The launcher's MPI decides the options for hosts, places and labels.
version=$("$launcher" --version 2>&1)
case $version in
*"Open MPI"* | *OpenRTE* | *PRRTE* | *prterun*)
    case $version in
    *"(Open MPI) "[1-4].* | *"(OpenRTE) "*) labels=(--tag-output) ;;
    *) labels=(--output tag) ;;
    esac
    launch=("$launcher" -n {{ job.ranks }} --host "$slot_list" "${labels[@]}"{% if not placed and job.oversubscribe %} --map-by ppr:{{ job.ranks_per_node }}:node:OVERSUBSCRIBE --bind-to none{% elif not placed %} --map-by ppr:{{ job.ranks_per_node }}:node:PE={{ job.threads }} --bind-to core{% endif %})
{% if job.stage %}
    each_node=("$launcher" -n {{ job.nodes }} --host "$host_list" --map-by ppr:1:node --bind-to none)
{% endif %}
    # It starts ranks on other hosts with a bare environment.
    for name in PATH LD_LIBRARY_PATH PYTHONPATH OMP_NUM_THREADS PYTHONSAFEPATH PYTHONUNBUFFERED MPILLM_JOB_END MPILLM_JOB_RESTART{% if plugin %} MPILLM_SCHEDULER{% endif %} HDF5_USE_FILE_LOCKING{% for name in names.values() %} {{ name }}{% endfor %}; do
        [ -z "${!name:-}" ] || launch+=(-x "$name")
    done
    ;;
*Intel* | *HYDRA*)
{% if scheduler == "slurm" %}
    # It starts its helpers by srun, whose own MPI would get in the way.
    export SLURM_MPI_TYPE=none
{% endif %}
    launch=("$launcher" -n {{ job.ranks }} -hosts "$host_list" -prepend-rank{% if not placed %} -ppn {{ job.ranks_per_node }}{% endif %})
{% if job.stage %}
    each_node=("$launcher" -n {{ job.nodes }} -hosts "$host_list" -ppn 1)
{% endif %}
{% if not placed and not job.oversubscribe %}
    case $version in
    *Intel*) export I_MPI_PIN_DOMAIN=omp ;;
    *) launch+=(-bind-to core:{{ job.threads }}) ;;
    esac
{% endif %}
    ;;
*PALS*)
    launch=("$launcher" -n {{ job.ranks }}{% if not placed %} --ppn {{ job.ranks_per_node }} --depth {{ job.threads }} --cpu-bind depth{% endif %})
{% if job.stage %}
    each_node=("$launcher" -n {{ job.nodes }} --ppn 1)
{% endif %}
    ;;
*)
    say "$launcher is of an MPI that is not known here: give its way of placing ranks as launcher_arguments in the site file"
    launch=("$launcher" -n {{ job.ranks }})
{% if job.stage %}
    each_node=("$launcher" -n {{ job.nodes }})
{% endif %}
    ;;
esac
{% if site.launcher_arguments %}
arguments=({% for word in site.launcher_arguments %}{{ word }} {% endfor %})
launch+=("${arguments[@]}")
{% if job.stage and not placed %}
each_node+=("${arguments[@]}")
{% endif %}
{% endif %}
