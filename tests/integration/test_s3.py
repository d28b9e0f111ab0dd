"""Faults of a store in a bucket: lost responses, outages, wrong credentials, servers that do not keep the contract."""

import json
import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import structlog
import trustme
from minio import Minio
from minio.credentials.providers import AssumeRoleProvider

import memtail
from memtail.cli.doctor import examine
from memtail.errors import StoreError
from memtail.settings import S3Settings
from memtail.storage import ObjectNotFound, UnreachableError
from memtail.storage.open import open_bucket, open_store
from memtail.storage.s3 import S3Store
from services.common.settings import ServiceSettings
from tests.support.cli import command
from tests.support.fake_s3 import FakeS3
from tests.support.servers import REGION, LossyProxy, MinioServer, free_port


@pytest.fixture(scope="session")
def bucket(minio):
    """A bucket shared by many tests, each with its own prefix."""
    return minio.new_bucket()


@pytest.fixture
def logs():
    with structlog.testing.capture_logs() as events:
        yield events


@pytest.fixture
def proxy(minio):
    with LossyProxy(minio) as proxy:
        yield proxy


@pytest.fixture
def environment(monkeypatch):
    for variable in list(os.environ):
        if variable.startswith(("MEMTAIL_S3_", "AWS_")):
            monkeypatch.delenv(variable)
    return monkeypatch


def test_a_write_whose_response_is_lost_is_recognised(minio, bucket, proxy, logs):
    store = S3Store(bucket, "lost", minio.settings(endpoint=proxy.endpoint))
    proxy.cuts.append((b"PUT", 0))
    assert store.put_if_absent("k", b"mine")
    assert not proxy.cuts
    assert [event["event"] for event in logs] == ["store fails, trying again"]
    assert sum(request.startswith(b"PUT") for request in proxy.requests) == 1
    assert not store.put_if_absent("k", b"mine")
    assert S3Store(bucket, "lost", minio.settings()).get("k") == b"mine"


def test_each_request_is_reported_with_its_outcome_and_bytes(minio, bucket, proxy, tmp_path, logs):
    told = []
    store = S3Store(bucket, "told", minio.settings(endpoint=proxy.endpoint), observe=lambda *request: told.append(request))

    def requests():
        seen = [(operation, outcome, size) for operation, outcome, seconds, size in told if seconds > 0]
        told.clear()
        return seen

    proxy.cuts.append((b"PUT", 0))
    assert store.put_if_absent("k", b"four")
    assert requests() == [("put", "failed", 0), ("put", "ok", 4)]
    assert not store.put_if_absent("k", b"other")
    assert requests() == [("put", "exists", 0)]
    store.put("k", b"other")
    assert store.get("k") == b"other"
    assert requests() == [("put", "ok", 5), ("get", "ok", 5)]
    proxy.cuts.append((b"GET", 0))
    store.download("k", tmp_path / "k")
    store.upload("l", tmp_path / "k")
    assert requests() == [("get", "failed", 0), ("get", "ok", 5), ("put", "ok", 5)]
    with pytest.raises(ObjectNotFound):
        store.get("none")
    assert store.exists("k")
    assert not store.exists("none")
    assert list(store.list("")) == ["k", "l"]
    store.delete("k")
    expected = [("get", "absent"), ("head", "ok"), ("head", "absent"), ("list", "ok"), ("delete", "ok")]
    assert requests() == [(*request, 0) for request in expected]
    stranger = S3Store(bucket, settings=minio.settings(secret_key="wrong"), observe=lambda *request: told.append(request))
    with pytest.raises(StoreError):
        stranger.get("k")
    assert requests() == [("get", "refused", 0)]


def test_a_refused_write_of_equal_bytes_is_not_taken_for_success_if_its_response_is_lost(minio, bucket, proxy):
    store = S3Store(bucket, "refused", minio.settings(endpoint=proxy.endpoint))
    assert S3Store(bucket, "refused", minio.settings()).put_if_absent("k", b"same")
    proxy.cuts.append((b"PUT", 0))
    assert not store.put_if_absent("k", b"same")
    assert not proxy.cuts


def test_exactly_one_of_many_writers_wins_although_responses_are_lost(minio, bucket, proxy):
    store = S3Store(bucket, "many", minio.settings(endpoint=proxy.endpoint))
    for attempt in range(5):
        proxy.cuts += [(b"PUT", 0)] * 6
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda _, key=f"k/{attempt}": store.put_if_absent(key, b"same"), range(8)))
        assert sum(won) == 1
        proxy.cuts.clear()


@pytest.mark.parametrize("after", [0, 1000, 1 << 20])
def test_an_interrupted_read_is_retried_and_never_truncated(minio, bucket, proxy, tmp_path, logs, after):
    content = os.urandom(3 << 20)
    store = S3Store(bucket, "short", minio.settings(endpoint=proxy.endpoint))
    store.put("k", content)
    proxy.cuts.append((b"GET", after))
    assert store.get("k") == content
    proxy.cuts.append((b"GET", after))
    store.download("k", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    proxy.cuts.append((b"GET", after % 300))
    assert list(store.list("")) == ["k"]
    assert not proxy.cuts
    assert len(logs) == 3


def test_a_server_that_restarts_during_a_write_delays_it(tmp_path):
    with MinioServer(tmp_path) as server:
        store = S3Store(server.new_bucket(), settings=server.settings())
        server.stop()
        tried_in_vain = threading.Event()
        with structlog.testing.capture_logs() as logs, ThreadPoolExecutor(2) as pool:
            writes: list[Future[Any]] = [pool.submit(store.put, "put", b"1"), pool.submit(store.put_if_absent, "new", b"2")]
            while len({event["key"] for event in logs}) < 2:
                assert not tried_in_vain.wait(0.01)
                assert not any(write.done() for write in writes)
            server.start()
            assert writes[1].result() is True
            assert writes[0].result() is None
        assert store.get("put") == b"1"
        assert store.get("new") == b"2"


def test_a_server_that_stays_down_is_one_clear_error_after_a_bounded_time(logs):
    settings = S3Settings(endpoint=f"http://127.0.0.1:{free_port()}", access_key="a" * 20, secret_key="b" * 40)
    with pytest.raises(UnreachableError) as caught:
        S3Store("bucket", "p", settings, attempts=3).put_if_absent("k", b"")
    assert str(caught.value) == (
        f"store s3://bucket/p at {settings.endpoint}: 'k' cannot be written (Connection refused): "
        f"check that the server is up, and that MEMTAIL_S3_ENDPOINT is its URL"
    )
    assert [event["attempt"] for event in logs] == [1, 2]
    began = time.monotonic()
    with pytest.raises(StoreError, match="Connection refused"):
        S3Store("bucket", "p", settings, attempts=10**6, patience=0.5).get("k")
    assert time.monotonic() - began < 10


def test_a_server_that_does_not_respond_is_given_up(logs):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = S3Settings(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", access_key="a" * 20, secret_key="b" * 40)
        with pytest.raises(StoreError, match=r"'k' cannot be read \(no answer within 0.1 s\)"):
            S3Store("bucket", "", settings, attempts=2, timeout=0.1).get("k")
    assert len(logs) == 1


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"access_key": "nobody-knows"}, r"\(InvalidAccessKeyId: .*\): set MEMTAIL_S3_ACCESS_KEY and MEMTAIL_S3_SECRET_KEY"),
        ({"secret_key": "wrong-secret"}, r"\(SignatureDoesNotMatch: .*\): set MEMTAIL_S3_ACCESS_KEY and MEMTAIL_S3_SECRET_KEY"),
        ({"session_token": "wrong-token"}, r"\(InvalidTokenId: .*\): set MEMTAIL_S3_ACCESS_KEY and MEMTAIL_S3_SECRET_KEY"),
        ({"region": "eu-north-7"}, r"\(AuthorizationHeaderMalformed: .*\): set MEMTAIL_S3_REGION"),
    ],
)
def test_wrong_credentials_are_one_clear_error_at_once(minio, bucket, logs, changes, cause):
    store = S3Store(bucket, "", minio.settings(**changes))
    for action in (store.verify_contract, lambda: store.put("k", b""), lambda: store.get("k")):
        with pytest.raises(StoreError, match=cause) as caught:
            action()
        assert not isinstance(caught.value, ObjectNotFound)
        assert "\n" not in str(caught.value)
    assert not logs


def test_a_missing_bucket_is_one_clear_error_at_once(minio, logs):
    store = S3Store("not-there", "", minio.settings())
    for action in (store.verify_contract, lambda: store.put_if_absent("k", b""), lambda: list(store.list("")), lambda: store.get("k")):
        with pytest.raises(StoreError, match=r"NoSuchBucket.*make the bucket") as caught:
            action()
        assert not isinstance(caught.value, ObjectNotFound)
    assert not logs


def test_a_temporary_read_only_key_reads_and_errors_of_writes_name_the_missing_permissions(minio, bucket, logs):
    S3Store(bucket, "reading", minio.settings()).put("k", b"1")
    actions = ["s3:GetObject", "s3:ListBucket", "s3:GetBucketLocation"]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": ["arn:aws:s3:::*"]}]}
    provider = AssumeRoleProvider(
        sts_endpoint=minio.endpoint, access_key=minio.access_key, secret_key=minio.secret_key, policy=json.dumps(policy), region=REGION
    )
    key = provider.retrieve()
    settings = minio.settings(access_key=key.access_key, secret_key=key.secret_key, session_token=key.session_token)
    store = S3Store(bucket, "reading", settings)
    assert store.get("k") == b"1"
    assert list(store.list("")) == ["k"]
    for action in (store.verify_contract, lambda: store.put("k", b""), lambda: store.put_if_absent("k", b""), lambda: store.delete("k")):
        with pytest.raises(StoreError, match=r"AccessDenied: .*let this key list the bucket, and get, put and delete objects"):
            action()
    assert not logs


def test_a_large_clock_difference_is_one_clear_error(minio, bucket, monkeypatch, logs):
    monkeypatch.setattr("minio.time.utcnow", lambda: datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(StoreError, match=r"RequestTimeTooSkewed.*set the clock of this machine"):
        S3Store(bucket, "", minio.settings()).verify_contract()
    assert not logs


def test_a_server_may_have_a_certificate_of_a_private_authority(tmp_path, logs):
    authority = trustme.CA()
    certificate, folder = authority.issue_cert("127.0.0.1"), tmp_path / "certs"
    folder.mkdir()
    certificate.private_key_pem.write_to_path(folder / "private.key")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "public.crt", append=True)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    with MinioServer(tmp_path, folder) as server:
        trusting = server.settings(ca_file=folder / "ca.pem")
        store = S3Store(server.new_bucket(), "p", trusting)
        store.verify_contract()
        store.put("k", b"safe")
        assert store.put_if_absent("new", b"1")
        assert not store.put_if_absent("new", b"1")
        assert store.get("k") == b"safe"
        name = store.address.split("/")[2]
        with pytest.raises(StoreError, match=r"TLS: .*CERTIFICATE_VERIFY_FAILED.*MEMTAIL_S3_CA_FILE"):
            S3Store(name, "p", server.settings()).get("k")
        plain = f"http://127.0.0.1:{server.port}"
        with pytest.raises(StoreError, match=r"HTTP status 400.*check MEMTAIL_S3_ENDPOINT"):
            S3Store(name, "p", server.settings(endpoint=plain)).get("k")
    assert not logs


def test_tls_to_a_server_without_it_is_one_clear_error_at_once(minio, bucket, logs):
    with pytest.raises(StoreError, match="TLS: "):
        S3Store(bucket, "", minio.settings(endpoint=minio.endpoint.replace("http:", "https:"))).get("k")
    assert not logs


def test_a_bucket_may_be_addressed_by_its_host_name(minio, bucket, monkeypatch):
    import socket

    asked, resolve = set(), socket.getaddrinfo

    def here(host, *arguments, **options):
        asked.add(host)
        return resolve("127.0.0.1" if str(host).endswith("localhost") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    endpoint = f"http://localhost:{minio.port}"
    virtual = S3Store(bucket, "addressing", minio.settings(endpoint=endpoint, addressing="virtual"))
    virtual.verify_contract()
    assert virtual.put_if_absent("k", b"1")
    assert f"{bucket}.localhost" in asked
    asked.clear()
    assert S3Store(bucket, "addressing", minio.settings(endpoint=endpoint, addressing="path")).get("k") == b"1"
    assert asked == {"localhost"}


def test_stores_under_two_prefixes_of_a_bucket_do_not_see_each_other(minio, bucket):
    one, other = (S3Store(bucket, f"shared/{name}", minio.settings()) for name in ("one", "one-more"))
    one.put("k", b"1")
    other.put("k", b"2")
    assert one.get("k") == b"1"
    assert list(one.list("")) == ["k"]
    other.delete("k")
    assert list(one.list("")) == ["k"]
    assert list(other.list("")) == []
    assert list(S3Store(bucket, "shared", minio.settings()).list("")) == ["one/k"]


def test_large_files_are_uploaded_in_parts_and_downloaded_whole(minio, bucket, proxy, tmp_path):
    store = S3Store(bucket, "parts", minio.settings(endpoint=proxy.endpoint), part_size=5 << 20)
    (tmp_path / "up").write_bytes(os.urandom((20 << 20) + 7))
    store.upload("k", tmp_path / "up")
    assert sum(b"partNumber=" in request for request in proxy.requests) == 5
    store.download("k", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == (tmp_path / "up").read_bytes()
    for key, lost in (("k2", b"PUT"), ("k3", f"POST /{bucket}/parts/k3?uploadId".encode())):
        proxy.cuts.append((lost, 0))
        store.upload(key, tmp_path / "up")
        assert store.get(key) == (tmp_path / "up").read_bytes()
        assert not proxy.cuts


def test_a_listing_of_several_pages_is_complete_and_ordered(minio, bucket, monkeypatch):
    monkeypatch.setattr("memtail.storage.s3._PAGE", 7)
    store = S3Store(bucket, "pages", minio.settings())
    names = [f"{number:03d}/x y+z%&ü" for number in range(28)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put(name, b""), reversed(names)))
    assert list(store.list("")) == names
    assert list(store.list("01")) == names[10:20]
    assert store.get(names[3]) == b""


def test_folders_are_listed_without_their_content(minio, bucket, proxy):
    store = S3Store(bucket, "folders", minio.settings(endpoint=proxy.endpoint))
    for number in range(20):
        store.put(f"experiments/e/trials/{number}", b"")
    proxy.requests.clear()
    assert list(store.folders("experiments/")) == ["e"]
    assert len(proxy.requests) == 1
    assert b"delimiter=%2F" in proxy.requests[0]


def test_credentials_come_from_variables_or_from_files_that_they_name(minio, bucket, environment, tmp_path):
    environment.setenv("MEMTAIL_S3_ENDPOINT", minio.endpoint)
    for name, value in (("ACCESS", minio.access_key), ("SECRET", minio.secret_key)):
        (tmp_path / name).write_text(f"{value}\n")
        environment.setenv(f"MEMTAIL_S3_{name}_KEY_FILE", str(tmp_path / name))
    open_store(f"s3://{bucket}/files")
    environment.setenv("MEMTAIL_S3_SECRET_KEY_FILE", str(tmp_path / "missing"))
    with pytest.raises(StoreError, match=r"MEMTAIL_S3_SECRET_KEY_FILE names .*missing, which cannot be read"):
        open_store(f"s3://{bucket}/files")
    environment.delenv("MEMTAIL_S3_SECRET_KEY_FILE")
    with pytest.raises(StoreError, match="MEMTAIL_S3_ACCESS_KEY is set, but MEMTAIL_S3_SECRET_KEY is not"):
        open_store(f"s3://{bucket}/files")
    environment.delenv("MEMTAIL_S3_ACCESS_KEY_FILE")
    environment.setenv("AWS_ACCESS_KEY_ID", minio.access_key)
    environment.setenv("AWS_SECRET_ACCESS_KEY", minio.secret_key)
    open_store(f"s3://{bucket}/files")


@pytest.fixture
def key_files(environment, tmp_path, minio):
    """Function that writes the files of an access key and a secret key, which the environment names."""

    def write(access, key):
        for name, value in (("ACCESS", access), ("SECRET", key)):
            (tmp_path / f"{name}.new").write_text(value)
            (tmp_path / f"{name}.new").replace(tmp_path / name)
            environment.setenv(f"MEMTAIL_S3_{name}_KEY_FILE", str(tmp_path / name))

    environment.setenv("MEMTAIL_S3_ENDPOINT", minio.endpoint)
    return write


@pytest.mark.parametrize("first", ["server", "files"])
def test_a_key_rotated_during_writes_loses_none(minio, bucket, key_files, logs, first):
    """The secret changes at the server before the files do, or after; meanwhile the two differ, and every request is refused."""
    user, enough, stop = f"user-{first}", threading.Event(), threading.Event()
    minio.add_user(user, "secret-before")
    key_files(user, "secret-before")
    store = S3Store(bucket, f"rotated-{first}")
    written = []

    def write(thread):
        number = 0
        while not stop.is_set():
            assert store.put_if_absent(f"{thread}/{number}", b"1")
            store.put(f"{thread}/{number}", b"2")
            assert store.exists(f"{thread}/{number}")
            written.append(f"{thread}/{number}")
            number += 1
            if len(written) > 20:
                enough.set()

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, thread) for thread in range(4)]
        steps = [lambda: minio.add_user(user, "secret-after"), lambda: key_files(user, "secret-after")]
        enough.wait(30)
        for step in steps if first == "server" else reversed(steps):
            step()
            refusals, deadline = len(logs), time.monotonic() + 30
            while len(logs) < refusals + 2 and step is not steps[-1 if first == "server" else 0]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        before = len(written)
        while len(written) < before + 20 and not any(writer.done() for writer in writers):
            time.sleep(0.01)
        stop.set()
        for writer in writers:
            writer.result()
    assert any("SignatureDoesNotMatch" in event["error"] for event in logs)
    assert set(store.list("")) == set(written)
    assert all(store.get(key) == b"2" for key in written)


def test_a_check_is_answered_if_its_key_is_replaced_just_after_it_was_refused(minio, bucket, key_files, environment):
    """A response to HEAD has no content, so the cause of a refusal is asked for by a second request."""
    key_files(minio.access_key, minio.secret_key)
    store = S3Store(bucket, "replaced")
    store.put("k", b"1")
    store.put("empty", b"")
    head = Minio.stat_object

    def replaced_after(*arguments, **options):
        key_files(minio.access_key, "secret-before")
        try:
            return head(*arguments, **options)
        finally:
            key_files(minio.access_key, minio.secret_key)

    environment.setattr(Minio, "stat_object", replaced_after)
    assert store.exists("k")
    assert store.exists("empty")
    assert not store.exists("none")


def test_a_key_in_a_file_that_never_worked_is_refused_at_once(minio, bucket, key_files, logs):
    key_files(minio.access_key, "wrong-secret")
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        S3Store(bucket).get("k")
    assert not logs


def test_a_file_of_a_key_that_is_missing_for_a_moment_does_no_harm(minio, bucket, key_files, tmp_path):
    key_files(minio.access_key, minio.secret_key)
    store = S3Store(bucket, "moment")
    store.put("k", b"1")
    (tmp_path / "SECRET").unlink()
    assert store.get("k") == b"1"


def test_a_session_token_must_be_in_a_file_for_services_and_runs_and_may_expire(
    minio, bucket, key_files, environment, tmp_path, declare, digits
):
    def assume():
        provider = AssumeRoleProvider(sts_endpoint=minio.endpoint, access_key=minio.access_key, secret_key=minio.secret_key, region=REGION)
        return provider.retrieve()

    key = assume()
    key_files(key.access_key, key.secret_key)
    environment.setenv("MEMTAIL_S3_SESSION_TOKEN", key.session_token)
    message = "MEMTAIL_S3_SESSION_TOKEN is set, but a session token expires before .*: name files .* MEMTAIL_S3_ACCESS_"
    environment.setenv("MEMTAIL_STORE", f"s3://{bucket}")
    for long_lived in (ServiceSettings.from_environment, lambda: memtail.run(declare(), f"s3://{bucket}", dataset=digits)):
        with pytest.raises(StoreError, match=message):
            long_lived()
    for variable, value in zip(S3Settings.key_variables(), (key.access_key, key.secret_key, key.session_token), strict=True):
        environment.setenv(variable, value)
    assert json.loads(command("status", "--store", f"s3://{bucket}", "--json").stdout) == []
    for variable in S3Settings.key_variables():
        environment.delenv(variable)
    (tmp_path / "token").write_text(key.session_token)
    environment.setenv("MEMTAIL_S3_SESSION_TOKEN_FILE", str(tmp_path / "token"))
    store = S3Store(bucket, "token")
    store.put("k", b"1")
    (tmp_path / "token").write_text("expired")
    with ThreadPoolExecutor(1) as pool, structlog.testing.capture_logs() as logs:
        reading = pool.submit(store.get, "k")
        while not logs:
            assert not reading.done()
        key = assume()
        key_files(key.access_key, key.secret_key)
        (tmp_path / "token").write_text(key.session_token)
        assert reading.result() == b"1"


def test_without_a_key_credentials_of_aws_are_used(minio, bucket, environment, tmp_path, logs):
    environment.setenv("MEMTAIL_S3_ENDPOINT", minio.endpoint)
    environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    environment.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{free_port()}/")
    with pytest.raises(StoreError, match=r"there is no key for the S3 server, here or from AWS: set MEMTAIL_S3_ACCESS_KEY"):
        open_store(f"s3://{bucket}/aws")
    content = f"[default]\naws_access_key_id = {minio.access_key}\naws_secret_access_key = {minio.secret_key}\n"
    (tmp_path / "credentials").write_text(content)
    open_store(f"s3://{bucket}/aws")
    assert not logs


def test_no_secret_is_ever_shown(minio, bucket, proxy, logs, caplog):
    caplog.set_level(logging.DEBUG)
    settings = minio.settings(endpoint=proxy.endpoint)
    store = S3Store(bucket, "secrets", settings)
    proxy.cuts += [(b"PUT", 0), (b"HEAD", 0)]
    store.put_if_absent("k", b"")
    wrong = S3Store(bucket, "secrets", minio.settings(session_token="session-token-of-mine"), attempts=2)
    with pytest.raises(StoreError) as caught:
        wrong.put_if_absent("k", b"")
    chain: BaseException | None = caught.value
    seen = []
    while chain is not None:
        seen.append(str(chain))
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    shown = f"{settings} {settings!r} {store} {store!r} {store.address} {seen} {logs}"
    assert len(logs) == 2
    assert len(seen) == 1
    for secret in (minio.access_key, minio.secret_key, "session-token-of-mine", "X-Amz-Signature"):
        assert secret not in shown
    assert minio.secret_key not in caplog.text


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/x", "gs://bucket/x is not the address of a store"),
        ("s3:/bucket/x", "is not the address of a store: give a folder, or s3://BUCKET/PREFIX"),
        ("s3://", "'' is not the name of a bucket"),
        ("s3://UPPER/x", "'UPPER' is not the name of a bucket"),
        ("s3://bucket/../x", "is not a key"),
    ],
)
def test_an_invalid_address_of_a_store_is_refused(environment, address, message):
    with pytest.raises(StoreError, match=message):
        open_store(address)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MEMTAIL_S3_ENDPOINT", "127.0.0.1:9000", "MEMTAIL_S3_ENDPOINT or MEMTAIL_S3_REGION is malformed"),
        ("MEMTAIL_S3_ENDPOINT", "http://user:hidden@127.0.0.1:9000", "MEMTAIL_S3_ENDPOINT or MEMTAIL_S3_REGION is malformed"),
        ("MEMTAIL_S3_ENDPOINT", "http://127.0.0.1:9000/path", "MEMTAIL_S3_ENDPOINT or MEMTAIL_S3_REGION is malformed"),
        ("MEMTAIL_S3_REGION", "a b", "MEMTAIL_S3_ENDPOINT or MEMTAIL_S3_REGION is malformed"),
        ("MEMTAIL_S3_ADDRESSING", "sideways", "MEMTAIL_S3_ADDRESSING is 'sideways': set it to path or virtual"),
        ("MEMTAIL_S3_CA_FILE", "/not/there", "MEMTAIL_S3_CA_FILE names /not/there, which is not a file"),
    ],
)
def test_a_malformed_setting_is_refused_by_name(environment, variable, value, message):
    environment.setenv(variable, value)
    with pytest.raises(StoreError, match=message) as caught:
        open_bucket("s3://bucket")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores-condition", r"it overwrites an object in spite of If-None-Match: \*"),
        ("ignores-match", "it overwrites an object in spite of If-Match with another ETag"),
        ("ignores-range", "it does not return the range of an object that is asked for"),
        ("drops-metadata", "it does not keep the metadata of an object"),
        ("refuses", r"it refuses a conditional write of a new object \(status 412\)"),
        ("races", "it reports success to .* of 16 concurrent writers of one new object"),
        ("races-match", "it reports success to .* of 16 concurrent writers that replace one object with If-Match"),
        ("answers-200", r"it overwrites an object in spite of If-None-Match: \*, or answers as if it did \(status 200\)"),
        ("answers-304", r"it answers a write that If-None-Match: \* forbids with status 304 instead of 412"),
        ("answers-409", r"it answers a write that If-None-Match: \* forbids with status 409 instead of 412"),
        ("answers-501", r"it does not implement conditional writes \(status 501\)"),
    ],
)
def test_a_server_that_does_not_keep_the_contract_is_refused_at_the_start(environment, fault, message):
    with FakeS3() as sound:
        S3Store("bucket", "", sound.settings()).verify_contract()
        assert not sound.objects
    with FakeS3(fault) as server:
        with pytest.raises(StoreError, match=message):
            S3Store("bucket", "", server.settings()).verify_contract()
        assert not server.objects
        for name, value in (("ENDPOINT", server.settings().endpoint), ("ACCESS_KEY", "a" * 20), ("SECRET_KEY", "b" * 40)):
            environment.setenv(f"MEMTAIL_S3_{name}", value)
        with pytest.raises(StoreError, match=message):
            open_store("s3://bucket/x")
        assert open_store("s3://bucket/x", verify=False).address == "s3://bucket/x"


def test_a_server_that_is_not_s3_is_one_clear_error_at_once(logs):
    class Anything(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Anything) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        settings = S3Settings(endpoint=f"http://127.0.0.1:{server.server_port}", access_key="a" * 20, secret_key="b" * 40)
        with pytest.raises(StoreError, match="the answer is not that of an S3 server"):
            S3Store("bucket", "", settings).verify_contract()
        server.shutdown()
    assert not logs


def test_an_upload_that_fails_at_its_end_is_retried(tmp_path, logs):
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    with FakeS3("fails-late") as server:
        S3Store("bucket", "", server.settings(), part_size=5 << 20).upload("k", tmp_path / "file")
        assert list(server.objects) == ["/bucket/k"]
        assert len(logs) == 1


def test_a_write_repeated_by_a_proxy_is_recognised():
    with FakeS3("repeats") as server:
        store = S3Store("bucket", "", server.settings())
        assert store.put_if_absent("k", b"1")
        assert not store.put_if_absent("k", b"1")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (502, "BadGateway"),
        (504, "GatewayTimeout"),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
        (409, "ConditionalRequestConflict"),
        (400, "BadDigest"),
        (400, "IncompleteBody"),
    ],
)
def test_transient_errors_are_retried(logs, status, code):
    with FakeS3(failures=[(status, code), (status, code)]) as server:
        assert S3Store("bucket", "", server.settings()).put_if_absent("k", b"1")
        assert len(logs) == 2
        assert len(server.objects) == 1
        server.failures += [(status, code)]
        assert S3Store("bucket", "", server.settings()).get("k") == b"1"


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (404, "NoSuchBucket"), (501, "NotImplemented"), (400, "KeyTooLongError"), (409, "Other")]
)
def test_permanent_errors_are_not_retried(logs, status, code):
    for action in (lambda store: store.put_if_absent("k", b""), lambda store: store.put("k", b""), lambda store: store.get("k")):
        with FakeS3(failures=[(status, code)]) as server, pytest.raises(StoreError, match=f"'k' cannot be .* \\({code}: m\\): "):
            action(S3Store("bucket", "", server.settings()))
    assert not logs


def test_doctor_checks_the_bucket_the_conditional_write_and_the_clock(environment, minio, bucket):
    def checks(endpoint, address=f"s3://{bucket}/doctor"):
        for name, value in (("ENDPOINT", endpoint), ("ACCESS_KEY", minio.access_key), ("SECRET_KEY", minio.secret_key)):
            environment.setenv(f"MEMTAIL_S3_{name}", value)
        names = ("clock", "store", "conditional write")
        return {check.name: (check.fine, check.finding) for check in examine(address) if check.name in names}

    assert [fine for fine, _ in checks(minio.endpoint).values()] == [True, True, True]
    missing = checks(minio.endpoint, "s3://not-there")
    assert missing["clock"][0]
    assert not missing["store"][0]
    assert "NoSuchBucket" in missing["store"][1]
    for clock, text in ((600, "600 s behind the store's"), (-600, "600 s ahead of the store's")):
        with FakeS3("ignores-condition", clock=clock) as server:
            found = checks(server.settings().endpoint)
        assert found["clock"][0] is False
        assert abs(int(found["clock"][1].split()[0]) - 600) <= 2
        assert found["clock"][1][4:] == text[4:]
        assert found["store"][0]
        assert not found["conditional write"][0]
        assert "overwrites" in found["conditional write"][1]
