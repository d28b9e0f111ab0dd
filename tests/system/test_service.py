"""The service from submission to scores, undisturbed."""

import json

import numpy as np
import pytest
import torch
import trustme
from kombu.exceptions import OperationalError

from memtail.execution.progress import progress_of
from memtail.execution.submit import submit
from memtail.experiment_store import Control, ExperimentStore
from memtail.models import build_model
from memtail.report.pointer import latest_report
from memtail.report.publish import publish_report
from memtail.spec import NamedModel
from memtail.storage import keys
from services.common.broker import TASK, Assignment, Broker, celery_app
from services.common.settings import ServiceSettings
from tests.support.cluster import RedisServer
from tests.support.experiments import PER_SHARD, TRIALS
from tests.support.metrics import scrape


def test_the_service_publishes_the_bits_of_an_embedded_run(living, experiment, digits, expected):
    experiment_store = living.submit(experiment, digits)
    living.until_published(experiment_store, TRIALS)
    assert living.scores(experiment.name) == expected(experiment)
    living.until(lambda: latest_report(living.store, experiment.name))
    # equal to the report that any other process makes of these scores
    assert latest_report(living.store, experiment.name) == publish_report(living.store, experiment.name)
    assert not experiment_store.attempts()
    assert not list(experiment_store.store.list(keys.checkpoints(experiment.name)))


def test_an_experiment_ends_at_its_standard_error_after_the_trials_of_an_embedded_run(living, declare, digits, expected):
    execution = {"trials_per_shard": 16, "device": "cpu"}
    experiment = declare(64, name="sharp", subsets={"until": {"standard_error": 0.05, "quantile": 0.9}}, execution=execution)
    scores = expected(experiment)
    experiment_store = living.submit(experiment, digits)
    trials = int(json.loads(scores["summary.json"])["trials"])
    assert trials > 64
    living.until_published(experiment_store, trials)
    assert experiment_store.read_record().experiment.subsets.trials == trials
    assert living.scores("sharp") == scores


def test_chosen_shards_are_trained_twice_also_after_a_flush_of_redis_and_not_again(living, declare, digits):
    execution = {"trials_per_shard": TRIALS // 3, "device": "cpu", "verify": 1.0}
    experiment_store = living.submit(declare(TRIALS, name="twice", execution=execution), digits)
    living.until(experiment_store.trained_twice)
    living.redis.client().flushall()
    living.until(lambda: len(experiment_store.trained_twice()) == 3)
    living.until_published(experiment_store, TRIALS)
    assert not any(experiment_store.trained_twice().values())
    progress = progress_of(living.store, "twice")
    assert (progress.ending, progress.unverified, progress.lines) == ("published", [], [])
    # without leases after the flush, two workers may have verified one shard, or trained one at once, which compares them too
    living.until(lambda: not living.broker().leased() and not living.broker().waiting())
    ended = living.log_lines("worker", "shard ended", "twice")
    assert sum('"outcome": "verified"' in line or '"outcome": "lost race"' in line for line in ended) >= 3
    passes = scrape(living.kinds("dispatcher")[0]).value("memtail_passes_total")
    living.until(lambda: scrape(living.kinds("dispatcher")[0]).value("memtail_passes_total") >= passes + 5)
    assert living.log_lines("worker", "shard ended", "twice") == ended
    assert not experiment_store.attempts()


def test_priority_pause_and_cancellation_control_what_is_trained(living, declare, digits):
    living.end(*living.kinds("dispatcher"))
    execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
    paused, cancelled, low, high = (
        living.submit(declare(TRIALS, name=name, execution=execution), digits) for name in ("paused", "cancelled", "low", "high")
    )
    paused.set_control(Control("paused"))
    cancelled.set_control(Control("cancelled"))
    high.set_control(Control(priority=1))
    living.start("dispatcher")
    living.until_published(high, TRIALS)
    living.until_published(low, TRIALS)
    began = [
        min(experiment_store.batch(shard, experiment_store.read_record()).provenance.started for shard in experiment_store.committed())
        for experiment_store in (high, low)
    ]
    assert began[0] <= began[1]
    assert not paused.committed()
    assert not cancelled.committed()
    paused.set_control(Control())
    living.until_published(paused, TRIALS)
    assert not cancelled.committed()


def test_forged_messages_train_nothing_and_end_no_worker(living, experiment, digits):
    living.end(*living.kinds("dispatcher"), *living.kinds("worker"))
    experiment_store = living.submit(experiment, digits)
    broker = living.broker()
    fields = {"experiment": experiment.name, "fingerprint": experiment_store.read_record().fingerprint, "first": 0, "last": 3}
    changes = ({"fingerprint": "0" * 64}, {"last": TRIALS - 1}, {"first": 3, "last": 0}, {"first": 10**9, "last": 10**9 + 1})
    broker.send([Assignment.model_construct(**fields | change) for change in changes])
    for body in ({"experiment": "../digits"}, {}, {**fields, "more": 1}):
        broker._celery.send_task(TASK, kwargs=body)
    broker._celery.send_task("os.system", args=["true"])
    worker = living.start("worker")
    living.until(lambda: len(list(living.events(worker, "shard ended"))) == 2)
    living.until(lambda: len(list(living.events(worker, "message dropped: not an assignment"))) == 5)
    living.until(lambda: scrape(worker).value("memtail_messages_dropped_total") == 6)
    assert worker.log.read_text().count('"outcome": "not wanted"') == 2
    living.start("dispatcher")
    living.until_published(experiment_store, TRIALS)
    assert not experiment_store.attempts()


def test_a_broker_with_tls_is_refused_without_its_certificate(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "private.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "public.crt")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = RedisServer(tmp_path)
    server.start()
    try:
        assignment = Assignment(experiment="digits", fingerprint="0" * 64, first=0, last=3)
        broker = Broker(ServiceSettings(store="-", broker=server.url))
        broker.send([assignment])
        assert list(broker.queued("shards")) == [assignment]
        stranger = celery_app(ServiceSettings(store="-", broker=server.url.partition("?")[0]))
        with stranger.connection_for_write() as connection, pytest.raises(OperationalError, match="certificate"):
            connection.ensure_connection(max_retries=1, timeout=5)
    finally:
        server.stop()


def test_cancelling_drops_shards_in_training_and_resuming_trains_them_again(living, slow, digits):
    experiment_store = living.submit(slow, digits)
    broker = living.broker()
    living.until(broker.leased)
    experiment_store.set_control(Control("cancelled"))
    living.until(lambda: living.log_lines("worker", "shard ended", slow.name))
    living.until(lambda: not broker.leased() and not broker.waiting())
    assert all('"outcome": "not wanted"' in line for line in living.log_lines("worker", "shard ended", slow.name))
    assert not experiment_store.committed()
    assert not experiment_store.attempts()
    assert list(experiment_store.store.list(keys.checkpoints(slow.name)))
    experiment_store.set_control(Control())
    living.until(broker.leased)


def test_workers_fetch_the_masks_of_an_explicit_design(living, declare, digits, expected, tmp_path):
    np.save(tmp_path / "masks.npy", np.random.default_rng(0).random((TRIALS, digits.n_train)) < 0.7)
    subsets = {"design": "explicit", "masks": tmp_path / "masks.npy"}
    experiment = declare(TRIALS, name="masked", subsets=subsets, execution={"trials_per_shard": PER_SHARD, "device": "cpu"})
    scores = expected(experiment)
    submit(experiment, living.store)
    (tmp_path / "masks.npy").unlink()
    experiment_store = ExperimentStore(living.store, experiment.name)
    living.until_published(experiment_store, TRIALS)
    assert living.scores(experiment.name) == scores
    assert not experiment_store.attempts()


def test_workers_fetch_the_weights_that_networks_start_from(living, declare, digits, expected, tmp_path):
    network = {"name": "resnet9", "options": {"width": 2}}
    torch.save(build_model(NamedModel(**network), digits.image_shape, 7).state_dict(), tmp_path / "w.pt")
    execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
    model = {**network, "weights": str(tmp_path / "w.pt"), "freeze": ["0", "1"]}
    experiment = declare(
        TRIALS, name="tuned", model=model, training={"epochs": 1}, execution=execution, dataset={"name": "digits", "max_train": 200}
    )
    scores = expected(experiment)
    submit(experiment, living.store)
    (tmp_path / "w.pt").unlink()
    experiment_store = ExperimentStore(living.store, experiment.name)
    living.until_published(experiment_store, TRIALS)
    assert living.scores(experiment.name) == scores
    assert not experiment_store.attempts()


def test_an_experiment_whose_trials_all_diverge_ends_with_a_notice(living, declare, digits):
    training = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 1e30}}
    experiment_store = living.submit(
        declare(TRIALS, name="divergent", training=training, execution={"trials_per_shard": PER_SHARD, "device": "cpu"}), digits
    )
    living.until(lambda: progress_of(living.store, experiment_store.name).ending == "without scores")
    assert progress_of(living.store, experiment_store.name).notice_lines == [
        f"all {TRIALS} trials diverged, so there are no scores: lower the learning rate"
    ]


def test_a_worker_of_one_experiment_takes_only_its_shards_and_ends_when_none_is_left(living, declare, digits):
    living.end(*living.kinds("dispatcher"))
    execution = {"trials_per_shard": PER_SHARD, "device": "cpu"}
    mine, other = (living.submit(declare(TRIALS, name=name, execution=execution), digits) for name in ("mine", "other"))
    for experiment_store in (mine, other):
        fields = {
            "experiment": experiment_store.name,
            "fingerprint": experiment_store.read_record().fingerprint,
            "first": 0,
            "last": PER_SHARD - 1,
        }
        Broker(living.settings(experiment=experiment_store.name)).send([Assignment(**fields)])
    worker = living.start("worker", MEMTAIL_EXPERIMENT="mine", MEMTAIL_REST_SECONDS="2")
    assert worker.process.wait(90) == 0, worker.log.read_text()
    assert len(mine.committed()) == 1
    assert not other.committed()
