"""The shared cluster. In a job's code: `from fireflyer import fleet`, then `with fleet.job() as job: ...`."""

from fireflyer.fleet.job import Job, job

__all__ = ["Job", "job"]
