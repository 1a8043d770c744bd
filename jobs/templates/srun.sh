{# Ranks that leave with a code leave together, and srun passes it on where it kills none of them for it. #}
launch=(srun --nodes={{ job.nodes }} --ntasks={{ job.ranks }} --ntasks-per-node={{ job.ranks_per_node }}{% if not job.oversubscribe %} --cpus-per-task={{ job.threads }}{% endif %} --kill-on-bad-exit=0 --wait=60 --label{% if job.oversubscribe %} --overcommit{% endif %}{% for word in site.launcher_arguments %} {{ word }}{% endfor %})
{% if job.stage %}
each_node=(srun --nodes={{ job.nodes }} --ntasks={{ job.nodes }} --ntasks-per-node=1 --mpi=none --label)
{% endif %}
