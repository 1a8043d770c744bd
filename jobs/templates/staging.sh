{# The data's files go to each node's own disk; where one node lacks room, all read the shared folder. #}
data={{ job.data }} nodes={{ job.nodes }}
staged=''
unstage() {
    [ -z "$staged" ] || "${each_node[@]}" rm -rf -- "$staged"
    staged=''
}
stage_here() {
    source=$1 target=$2
    (umask 077 && mkdir -- "$target") || return 1
    need=$(du -sk -- "$source" | cut -f1)
    have=$(df -k --output=avail -- "$target" | tail -n 1)
    if [ "$((need + need / 20))" -gt "$have" ]; then
        echo "$HOSTNAME: no room in $target: $need KiB are needed and $have KiB are free"
        return 1
    fi
    cp -R -- "$source/." "$target/"
}
{% if local_variable %}
if [ -z "${ {{- local_variable -}} :-}" ]; then
    say "\${{ local_variable }} is not set in this job: training reads $data itself"
else
    staged=${{ local_variable }}{{ local_rest }}/mpillm-$job-$restart
fi
{% else %}
staged={{ local_rest }}/mpillm-$job-$restart
{% endif %}
if [ -n "$staged" ]; then
    say "copying $data to $staged on each node"
    if [ "$nodes" -eq 1 ]; then
        stage_here "$data" "$staged"
    else
        "${each_node[@]}" bash -c "$(declare -f stage_here); stage_here \"\$@\"" bash "$data" "$staged"
    fi
    copied=$?
    if [ "$copied" -eq 0 ]; then
        command+=(--set "data.path=$staged")
    else
        say "the copy failed: training reads $data itself"
        unstage
    fi
fi
