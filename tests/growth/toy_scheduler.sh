{% extends "job.sh" %}
{% block directives %}
#SPOOL seconds={{ time }} ranks={{ job.ranks }}
{% for directive in directives %}
#SPOOL {{ directive }}
{% endfor %}
{% endblock %}
{% block identity %}
job=$SPOOL_JOB restart=0 end=$SPOOL_END
{% endblock %}
{% block again %}
    say "a spool takes no job twice"
{% endblock %}
