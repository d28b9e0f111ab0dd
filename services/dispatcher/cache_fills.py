"""Jobs without GPUs that fill the workers' shared cache, one for each experiment, before its workers are created.

Such a Job stays until the experiment has nothing left to train, as a sign that the cache has its dataset. If the Job is deleted, another
one looks for the dataset again; if the dataset is evicted before workers run, a worker fetches it.
"""

import copy
from collections.abc import Iterable
from typing import Any

import structlog

from services.dispatcher.cluster import Cluster
from services.dispatcher.kubernetes_objects import Job, Pod
from services.dispatcher.watch_cache import RefusedError
from services.dispatcher.worker_jobs import EXPERIMENT_LABEL, NUMBER_LABEL, TEMPLATE_LABEL, Demand, FleetSettings, job_name, settings_hash

log = structlog.get_logger()

#: Label of Jobs and pods that fill the cache.
CACHE_LABEL = "memtail/cache"


class CacheFills:
    """Keeps a Job for each experiment with outstanding shards, if the fleet's settings have a template.

    Args:
        settings: of the fleet.
        cluster: runs the Jobs.
    """

    def __init__(self, settings: FleetSettings, cluster: Cluster) -> None:
        self._settings, self._cluster = settings, cluster

    def reconcile(self, demands: Iterable[Demand], jobs: Iterable[Job], pods: Iterable[Pod]) -> dict[str, str]:
        """Create and delete Jobs.

        Args:
            demands: of experiments that may have workers.
            jobs: the Jobs that fill the cache.
            pods: the pods of these Jobs.

        Returns:
            A line for each experiment whose workers are not to be created yet.

        Raises:
            ClusterError: the API server does not respond.
        """
        template = self._settings.fill
        wanted = [demand.experiment for demand in demands if template and demand.state == "running" and demand.outstanding]
        existing = {job.labels[EXPERIMENT_LABEL]: job for job in jobs}
        current = settings_hash(template or {})
        for name, job in list(existing.items()):
            # a failed one is made again, and one that cannot start, since its settings are wrong, with the present ones
            if name not in wanted or (not job.succeeded and (job.ended or job.labels.get(TEMPLATE_LABEL) != current)):
                self._cluster.delete_job(job.name)
                del existing[name]
        waiting = {name: _line(name, pods) for name in wanted if name not in existing or not existing[name].succeeded}
        for name in waiting.keys() - existing.keys():
            try:
                self._cluster.create_job(build_fill(self._settings, name, self._cluster.owner(self._settings.owner)))
                log.info("cache is being filled", experiment=name)
            except RefusedError as error:
                waiting[name] = f"the cache cannot be filled, and workers wait for it: {error}"
        return waiting


def build_fill(settings: FleetSettings, experiment: str, owner: dict[str, Any]) -> dict[str, Any]:
    """Build the manifest of the Job that fills the cache for an experiment."""
    job, labels = copy.deepcopy(settings.fill or {}), {EXPERIMENT_LABEL: experiment, CACHE_LABEL: "fill"}
    metadata, pod = job["metadata"], job["spec"]["template"]
    metadata |= {"name": job_name(settings, experiment, "cache"), "namespace": settings.namespace, "ownerReferences": [owner]}
    # earlier versions, to which a release may be rolled back, expect a number
    metadata["labels"] |= {**labels, NUMBER_LABEL: "0", TEMPLATE_LABEL: settings_hash(settings.fill or {})}
    pod["metadata"]["labels"] |= labels
    pod["spec"]["containers"][0]["args"] = [experiment]
    return {"apiVersion": "batch/v1", "kind": "Job", **job}


def _line(experiment: str, pods: Iterable[Pod]) -> str:
    own = [pod for pod in pods if pod.labels.get(EXPERIMENT_LABEL) == experiment]
    problems = [pod.problem for pod in sorted(own, key=lambda pod: pod.ended) if pod.problem]
    if problems and not any(pod.phase == "Running" for pod in own):
        return f"the cache cannot be filled, and workers wait for it: {problems[-1]}"
    return "the cache is being filled: workers start when it has the dataset"
