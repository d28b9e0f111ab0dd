"""Access to a cluster, without one."""

import pytest
from kubernetes.config import kube_config

from services.dispatcher.cluster import Cluster
from services.dispatcher.watch_cache import ClusterError


def test_a_missing_configuration_is_one_error_and_prints_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(
        ClusterError, match=r"no Kubernetes cluster is configured \(.*No configuration found.*; Service host/port is not set"
    ):
        Cluster("namespace", "selector")
    assert capfd.readouterr() == ("", "")
