"""Access to a cluster, without one."""

import json

import pytest
import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.config import kube_config

from services.dispatcher.cluster import Cluster, _request
from services.dispatcher.watch_cache import ClusterError, RefusedError


def test_a_missing_configuration_is_one_error_and_prints_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(
        ClusterError, match=r"no Kubernetes cluster is configured \(.*No configuration found.*; Service host/port is not set"
    ):
        Cluster("namespace", "selector")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("status", "refused"), [(400, True), (403, True), (422, True), (401, False), (429, False), (500, False), (503, False), (None, False)]
)
def test_a_request_that_the_api_server_refuses_is_told_from_a_server_that_fails(status, refused):
    error = ApiException(status, "reason") if status else urllib3.exceptions.ReadTimeoutError(None, "", "timeout")
    with pytest.raises(ClusterError) as caught, _request("create Job a"):
        raise error
    assert isinstance(caught.value, RefusedError) == refused


def test_an_error_has_the_message_of_the_api_server():
    error = ApiException(403, "Forbidden")
    error.body = json.dumps({"kind": "Status", "message": 'jobs.batch "a" is forbidden:\nexceeded quota'})
    with (
        pytest.raises(RefusedError, match=r'^cannot create Job a: 403 Forbidden: jobs.batch "a" is forbidden: exceeded quota$'),
        _request("create Job a"),
    ):
        raise error
