"""Runs last, because it uninstalls the release."""

from pathlib import Path

from tests.node.release import Release, Training


def test_uninstalling_keeps_only_the_bucket_for_a_new_release(release: Release, embedded: dict[str, bytes], tmp_path: Path) -> None:
    release.helm("upgrade", "--wait", "--timeout", "5m", workers__terminationGracePeriodSeconds=300)
    training = release.submit("uninstalled")
    training.begin()
    release.helm("uninstall", "--wait", "--timeout", "5m")
    bucket = f"persistentvolumeclaim/data-{release.name}-minio-0"
    # the workers do not wait for the end of their grace period
    release.until(lambda: release.contents() == {bucket, "configmap/kube-root-ca.crt", "serviceaccount/default"}, 120)
    release.helm("install", "--wait", "--timeout", "5m")
    Training(release, training.name, release.store()).assert_complete(embedded, tmp_path)
