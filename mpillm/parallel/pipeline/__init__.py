"""Pipeline parallelism: schedules as lists of actions, their checks and simulator, the executor."""
