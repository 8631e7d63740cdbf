"""The bundle, and the executors that run a chunk step from one."""
