"""Dashboards that follow a run: each in a process of its own, which reads the run's logs and can harm nothing."""
