"""Pipeline schedules, one a file: what one rank does, in which order, and what the schedule needs.

`schedule_catalog.py` lists them by name.
"""
