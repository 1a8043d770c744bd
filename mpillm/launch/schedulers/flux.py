"""Flux: flux-environment(7). Ranks run under it; `mpillm submit` has no script for it."""

from mpillm.launch.schedulers.batch_system import BatchSystem

FLUX = BatchSystem(title="Flux", submit=("flux",), job_variable="FLUX_JOB_ID")
