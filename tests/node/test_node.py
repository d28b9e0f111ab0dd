"""The images and the chart on a real node: scaling from and to zero workers. Run by `make test-node`."""

import json
from pathlib import Path

from tests.node.release import TRIALS, Release


def test_workers_scale_from_zero_and_back_to_zero(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    release.until(lambda: not release.pods("worker"))
    training = release.submit("untroubled")
    training.finish()
    assert training.trials() == list(range(TRIALS))
    assert training.progress.failed_attempts == 0
    assert training.scores(tmp_path) == embedded
    release.until(lambda: not release.pods("worker"))


def test_helm_test_succeeds(release: Release) -> None:
    assert "Succeeded" in release.helm("test", "--timeout", "5m")


def test_every_line_of_a_service_is_json(release: Release) -> None:
    for line in _log(release):
        assert json.loads(line)["event"]


def test_no_service_lacks_a_right(release: Release) -> None:
    assert not [line for line in _log(release) if "AccessDenied" in line or "NOPERM" in line]


def _log(release: Release) -> list[str]:
    """Return the lines of the services since they started."""
    logs = (
        release.kubectl("logs", f"deployment/{release.name}-{component}", "--container", component)
        for component in ("dispatcher", "aggregator", "explorer")
    )
    return [line for log in logs for line in log.splitlines()]
