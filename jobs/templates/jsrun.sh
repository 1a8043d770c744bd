launch=(jsrun -n {{ job.nodes }} -r 1 -a {{ job.ranks_per_node }} -c {{ job.cpus_per_node }} -g {{ job.gpus_per_node }} -b packed:{{ job.threads }} -e prepended{% for word in site.launcher_arguments %} {{ word }}{% endfor %})
{% if job.stage %}
each_node=(jsrun -n {{ job.nodes }} -r 1 -a 1 -c 1 -e prepended)
{% endif %}
