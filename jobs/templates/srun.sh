launch=(srun --nodes={{ job.nodes }} --ntasks={{ job.ranks }} --ntasks-per-node={{ job.ranks_per_node }}{% if not job.oversubscribe %} --cpus-per-task={{ job.threads }}{% endif %} --kill-on-bad-exit=1 --label{% if job.oversubscribe %} --overcommit{% endif %}{% for word in site.launcher_arguments %} {{ word }}{% endfor %})
{% if job.stage %}
each_node=(srun --nodes={{ job.nodes }} --ntasks={{ job.nodes }} --ntasks-per-node=1 --mpi=none --label)
{% endif %}
