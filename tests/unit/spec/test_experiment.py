"""Experiment file: defaults, fingerprints, and one clear line for each fault."""

from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import create_model

import memtail.spec
from memtail.errors import SpecError
from memtail.spec import Experiment, HuggingFaceSplits, ImagesTrainer, RecordedOutcomes, TrainingSpec, differences
from memtail.spec.base import _FIRST_KEYS, Part

BASE: dict[str, Any] = {"name": "digits", "dataset": {"name": "digits"}}

# Later keys and their defaults, as `Part.key`. Add a new key here; its default never changes, since fingerprints omit it.
LATER_KEYS: dict[str, Any] = {
    "DatasetSpec.orientation": "stored",
    "DatasetSpec.on_error": "stop",
    "ExecutionSpec.require": None,
    "ExecutionSpec.verify": 0.0,
    "ExecutionSpec.compile": "auto",
    "RecordedOutcomes.scores": "auto",
    "Experiment.trainer": ImagesTrainer(),
    "UntilSpec.interval_width": None,
    "UntilSpec.ranking": None,
    "UntilSpec.pairs": None,
    "FunctionTrainer.options": {},
    "FunctionTrainer.code": [],
    "FunctionTrainer.timeout": None,
    "FunctionTrainer.folder": None,
    "CommandTrainer.options": {},
    "CommandTrainer.code": [],
    "CommandTrainer.timeout": None,
    "CommandTrainer.folder": None,
    **{f"FunctionDataset.{key}": None for key in ("folder", "max_train", "max_test", "resolution")},
    "FunctionDataset.options": {},
    "FunctionDataset.code": [],
    **{f"TorchvisionDataset.{key}": None for key in ("root", "max_train", "max_test", "resolution")},
    "TorchvisionDataset.options": {},
    "TorchvisionDataset.orientation": "stored",
    "TorchvisionDataset.on_error": "stop",
    **{f"HuggingFaceDataset.{key}": None for key in ("config", "max_train", "max_test", "resolution")},
    "HuggingFaceDataset.splits": HuggingFaceSplits(train="train", test="test"),
    "HuggingFaceSplits.test": None,
    "DatasetSpec.test": None,
    "DatasetSpec.columns": None,
    "TableColumns.label": None,
    "TableColumns.text": None,
    "TableColumns.features": None,
    "TableColumns.image": None,
    "TableColumns.id": None,
    "TableColumns.split": None,
    "RecordedOutcomes.snapshots": [],
    "RecordedOutcomes.models": 0,
    "NamedModel.weights": None,
    "NamedModel.freeze": [],
    "RandomResizedCrop.scale": [0.08, 1.0],
    "RandomResizedCrop.ratio": [0.75, 4 / 3],
    "ColorJitter.brightness": 0.0,
    "ColorJitter.contrast": 0.0,
    "ColorJitter.saturation": 0.0,
    "ColorJitter.hue": 0.0,
    "RandomErasing.probability": 0.5,
    "RandomErasing.scale": [0.02, 0.33],
    "RandomErasing.ratio": [0.3, 3.3],
    "Adam.lr": 1.0e-3,
    "Adam.betas": [0.9, 0.999],
    "Adam.eps": 1.0e-8,
    "Adam.weight_decay": 0.0,
    "AdamW.lr": 1.0e-3,
    "AdamW.betas": [0.9, 0.999],
    "AdamW.eps": 1.0e-8,
    "AdamW.weight_decay": 1.0e-2,
}


def changed(path, value):
    spec = {**BASE}
    *parents, last = path.split(".")
    place = spec
    for parent in parents:
        place[parent] = dict(place.get(parent, {}))
        place = place[parent]
    place[last] = value
    return Experiment.parse(spec)


def test_a_minimal_file_gets_defaults_and_its_yaml_is_read_back(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("name: digits\ndataset: {name: digits}\n")
    experiment = Experiment.load(path)
    assert experiment.training.epochs == 20
    assert experiment.subsets.trials == 1000
    assert experiment.model.hidden == [256]
    assert Experiment.parse(yaml.safe_load(experiment.to_yaml())) == experiment


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", {}, "unknown key 'modle': did you mean 'model'?"),
        ("training.epoch", 3, "unknown key 'training.epoch': did you mean 'epochs'?"),
        ("training.optimizer.learning", 3, "unknown key 'training.optimizer.learning': known here: name, lr"),
        ("model", {"name": "mlp", "hiden": [3]}, "unknown key 'model.hiden': did you mean 'hidden'?"),
        ("model", {"name": "resnet9", "widht": 3}, "unknown key 'model.widht'"),
        ("training.schedule", {"name": "cosine", "warmpu": 0}, "unknown key 'training.schedule.warmpu': did you mean 'warmup'?"),
        ("subsets.fraction", 1.5, "subsets.fraction: input should be less than 1 (got 1.5)"),
        ("subsets.fraction", 0, "subsets.fraction: input should be greater than 0 (got 0)"),
        ("subsets.design", "random", "subsets.design: there is no 'random': known here: uniform, balanced, stratified, explicit"),
        ("training.optimizer", {"name": "adamm"}, "training.optimizer: there is no 'adamm': did you mean 'adam'?"),
        (
            "training.optimizer",
            {"name": "adamw", "momentum": 0.9},
            "unknown key 'training.optimizer.momentum': known here: name, lr, betas, eps",
        ),
        ("training.optimizer", {"name": "adam", "betas": [0.9, 1.0]}, "training.optimizer.betas.1: input should be less than 1 (got 1.0)"),
        ("training.optimizer", {"name": "adam", "betas": [0.9]}, "training.optimizer.betas: list should have at least 2 items"),
        ("training.optimizer", "adamw", "training.optimizer: input should be a valid dictionary"),
        ("training.augmentation", "flop", "training.augmentation.0: there is no 'flop': did you mean 'flip'?"),
        ("training.augmentation", "color-jitter", "training.augmentation.0: color-jitter changes nothing: set brightness, contrast"),
        (
            "training.augmentation",
            ["flip", {"name": "color-jitter", "hu": 0.1}],
            "unknown key 'training.augmentation.1.hu': did you mean 'hue'?",
        ),
        ("training.augmentation", ["flip", {"name": "random-erasing", "scale": [0.5, 0.1]}], "training.augmentation.1.scale: goes from"),
        ("model", {"name": "resnet18", "weights": "DEFAULT"}, "model.weights: are other weights in another version of torchvision"),
        ("model", {"name": "mlp", "weights": "w.pt"}, "unknown key 'model.weights': known here: name, hidden"),
        ("subsets.until", {"ranking": 20}, "subsets.until.ranking: takes the keys top, overlap, not a single value (got 20)"),
        ("subsets.until", 0.02, "subsets.until: takes the keys standard_error, interval_width, ranking, pairs, quantile, not a"),
        (
            "subsets.until",
            {"interval_width": 1e-6},
            "subsets.until.interval_width: input should be greater than or equal to 0.0001 (got 1e-06)",
        ),
        ("subsets.until", {"pairs": 0.8}, "subsets.until.pairs: takes the keys overlap, not a single value (got 0.8)"),
        ("subsets.until", {"pairs": {"overlap": 1.0}}, "subsets.until.pairs.overlap: input should be less than 1 (got 1.0)"),
        ("trainer", "forest", "trainer: takes keys, not a single value (got forest)"),
        ("record.snapshots", [5, 5], "record.snapshots: are different epochs in ascending order, not [5, 5]"),
        ("record.snapshots", [0], "record.snapshots.0: input should be greater than or equal to 1 (got 0)"),
        ("record.snapshots", [5, 30], "record.snapshots: 30 is after the last of 20 epochs"),
        ("training.schedule", {"name": "cosin"}, "training.schedule: there is no 'cosin': did you mean 'cosine'?"),
        ("execution.device", "gpu", "execution.device: "),
        ("execution.compile", "yes", "execution.compile: is auto, true or false (got yes)"),
        (
            "training.schedule",
            {"name": "onecycle"},
            "training.schedule: there is no 'onecycle': known here: constant, step, cosine",
        ),
        ("name", "My Experiment", "name: has lower-case letters, digits, '.', '_' and '-' only, at most 63: use my-experiment (got My Exp"),
        ("name", "!", "name: has lower-case letters, digits, '.', '_' and '-' only, at most 63 (got !)"),
        ("dataset", {"name": "mnst"}, "dataset.name: there is no 'mnst': did you mean 'mnist'?"),
        ("dataset", {"name": "imagenet"}, "dataset.name: there is no 'imagenet': known here: digits, mnist"),
        ("model", {"name": "mlpp", "hiden": [3]}, "model: there is no 'mlpp': did you mean 'mlp'?"),
        ("dataset", {"torchvision": "Fakedata"}, "dataset.torchvision: there is no 'Fakedata': did you mean 'FakeData'?"),
        ("dataset", {"torchvision": "cifar10"}, "dataset.torchvision: there is no 'cifar10': did you mean 'CIFAR10'?"),
        ("dataset", {"huggingface": "imdb"}, "dataset: huggingface 'imdb' needs columns, such as {text: text, label: label}"),
        ("trainer", {"function": "tr.ok"}, "trainer.function: is package.module:function, such as 'tr:ok' (got tr.ok)"),
        ("trainer", {"function": "ok"}, "trainer.function: is package.module:function (got ok)"),
        ("trainer", {"command": "python 'my x.py'"}, 'trainer.command: is a list, such as ["python", "my x.py"] (got python'),
        ("trainer", {"command": "python 'x.py"}, 'trainer.command: is a list, such as ["python", "\'x.py"] (got python'),
        (
            "trainer",
            {"function": "tr:ok", "command": ["python", "x.py"]},
            "trainer: has function 'tr:ok' and command ['python', 'x.py']: keep one of them",
        ),
        ("dataset", {"name": "folder"}, "dataset 'folder' needs a root"),
        ("dataset", {"name": "digits", "resolution": 3}, "resolution is for image files, of dataset 'folder' or columns.image; 'digits'"),
        ("subsets.masks", "m.npy", "are required for design 'explicit'"),
        ("training.optimizer", {"momentum": 0.0}, "nesterov needs a momentum"),
        (
            "execution.workers",
            {"tolerations": [{"key": "spot"}, {"key": "gpu", "value": "a100"}]},
            "execution.workers.tolerations.1: toleration of gpu has value a100, and operator Exists, the default, tolerates every value: "
            "set operator: Equal",
        ),
    ],
)
def test_a_fault_is_reported_in_one_line(path, value, message):
    with pytest.raises(SpecError) as caught:
        changed(path, value)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_several_faults_are_lines_for_a_terminal():
    content = {"name": "a", "dataset": {"name": "mnst"}, "training": {"epoch": 3}}
    with pytest.raises(SpecError) as caught:
        Experiment.parse(content, source="a.yaml")
    faults = ["dataset.name: there is no 'mnst': did you mean 'mnist'?", "unknown key 'training.epoch': did you mean 'epochs'?"]
    assert str(caught.value) == f"a.yaml: {'; '.join(faults)}"
    assert caught.value.lines == ("a.yaml: 2 mistakes", *(f"  {fault}" for fault in faults))
    assert changed("training.epochs", 3)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("none", "none"),
        ([], "none"),
        ("flip", "flip"),
        (["crop-flip"], "crop-flip"),
        ("random-resized-crop", [{"name": "random-resized-crop"}]),
        (["flip", {"name": "color-jitter", "hue": 0.1, "contrast": 0.0}], [{"name": "flip"}, {"name": "color-jitter", "hue": 0.1}]),
    ],
)
def test_augmentations_of_the_first_version_are_written_as_it_wrote_them(value, written):
    experiment = changed("training.augmentation", value)
    assert experiment.model_dump(mode="json")["training"]["augmentation"] == written
    assert Experiment.parse(yaml.safe_load(experiment.to_yaml())) == experiment


@pytest.mark.parametrize("text", ["- a list", "a: [", "\0", ""])
def test_a_file_that_is_not_yaml_or_not_a_mapping_is_named(tmp_path, text):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"e\.yaml"):
        Experiment.load(path)
    with pytest.raises(SpecError, match="cannot be read"):
        Experiment.load(tmp_path / "missing.yaml")


def test_only_built_in_networks_are_compiled_on_request():
    own = {"model": {"name": "package.module:network"}, "execution": {"compile": True}}
    with pytest.raises(
        SpecError, match=r"execution\.compile: true is for built-in networks: remove it, and compile your own network in its code$"
    ):
        Experiment.parse({**BASE, **own})
    for compiled in ("auto", False):
        assert Experiment.parse({**BASE, **own, "execution": {"compile": compiled}}).execution.compile == compiled


def test_the_fingerprint_omits_keys_on_which_no_trial_depends():
    base = Experiment.parse(BASE).fingerprint("d")
    for path, value in [
        ("execution.device", "cpu"),
        ("execution.compile", False),
        ("execution.trials_per_shard", 3),
        ("subsets.trials", 2000),
        ("name", "other"),
    ]:
        assert changed(path, value).fingerprint("d") == base, path
    assert Experiment.parse({**BASE, "dataset": {"name": "digits", "root": "/elsewhere"}}).fingerprint("d") == base


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.epochs", 21),
        ("training.optimizer.lr", 0.2),
        ("training.optimizer", {"name": "adamw"}),
        ("training.precision", "bfloat16"),
        ("subsets.seed", 1),
        ("subsets.fraction", 0.5),
        ("subsets.design", "balanced"),
        ("model", {"name": "mlp", "hidden": [255]}),
        ("record.margins", True),
    ],
)
def test_keys_that_change_a_trial_change_the_fingerprint_and_are_named(path, value):
    before, after = Experiment.parse(BASE), changed(path, value)
    assert before.fingerprint("d") != after.fingerprint("d")
    assert differences(before.canonical("d"), after.canonical("d"))[0].startswith(path)
    assert before.fingerprint("d") != before.fingerprint("other dataset")


def test_paths_are_relative_to_the_file_and_masks_count_by_content(tmp_path):
    for folder, value in (("a", True), ("b", True), ("c", False)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "masks.npy", np.full((3, 4), value))
        (tmp_path / folder / "e.yaml").write_text(
            yaml.safe_dump(
                {
                    **BASE,
                    "dataset": {"name": "folder", "root": "images"},
                    "subsets": {"design": "explicit", "masks": "masks.npy", "trials": 3},
                }
            )
        )
    a, b, c = (Experiment.load(tmp_path / folder / "e.yaml") for folder in "abc")
    assert a.dataset.root == tmp_path / "a" / "images"
    assert a.fingerprint("d") == b.fingerprint("d") != c.fingerprint("d")


def test_weights_are_relative_to_the_file_and_count_by_content(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.pt").write_bytes(content)
        (tmp_path / folder / "e.yaml").write_text(yaml.safe_dump({**BASE, "model": {"name": "resnet9", "weights": "w.pt"}}))
    a, b, c = (Experiment.load(tmp_path / folder / "e.yaml") for folder in "abc")
    assert a.model.weights == str(tmp_path / "a" / "w.pt")
    assert a.fingerprint("d") == b.fingerprint("d") != c.fingerprint("d")
    moved = a.with_files({tmp_path / "a" / "w.pt": tmp_path / "b" / "w.pt"})
    assert moved.model == b.model
    published = [changed("model", {"name": "resnet50", "weights": f"IMAGENET1K_V{version}"}) for version in (1, 2)]
    assert published[0].model.weights_file is None
    assert published[0].fingerprint("d") != published[1].fingerprint("d")
    (tmp_path / "a" / "w.pt").unlink()
    with pytest.raises(SpecError, match=r"model\.weights: .*w\.pt cannot be read \(No such file"):
        a.fingerprint("d")


def test_outcomes_by_epoch_of_training_code_of_the_users_own_are_refused():
    with pytest.raises(SpecError, match=r"record\.snapshots is for the built-in trainer, whose epochs memtail knows: remove it"):
        Experiment.parse({**BASE, "trainer": {"function": "train:train"}, "record": {"snapshots": [1]}})


def test_models_are_kept_of_the_first_trials_or_of_all_and_count_for_no_fingerprint():
    base = Experiment.parse(BASE)
    assert [base.record.keeps_model(0), changed("record.models", 2).record.keeps_model(2)] == [False, False]
    for kept in (2, "all"):
        experiment = changed("record.models", kept)
        assert experiment.record.keeps_model(1)
        assert experiment.fingerprint("d") == base.fingerprint("d")
        assert Experiment.parse(yaml.safe_load(experiment.to_yaml())) == experiment
    for wrong in (True, -1, "first 8", 1.5):
        with pytest.raises(SpecError, match=r"record\.models"):
            changed("record.models", wrong)


@pytest.mark.parametrize("trainer", [{"function": "train:train"}, {"command": ["true"]}])
def test_models_of_training_code_of_the_users_own_are_refused(trainer):
    with pytest.raises(SpecError, match=r"record\.models is for the built-in trainer: remove it, and save models in the training code$"):
        Experiment.parse({**BASE, "trainer": trainer, "record": {"models": 3}})


def test_later_keys_keep_their_defaults():
    parts = [part for part in vars(memtail.spec).values() if isinstance(part, type) and issubclass(part, Part)]
    later = {
        f"{part.__name__}.{key}": field.get_default(call_default_factory=True)
        for part in parts
        for key, field in part.model_fields.items()
        if key not in _FIRST_KEYS.get(part.__name__, {"name"}) and not field.is_required()
    }
    assert later == LATER_KEYS


def with_later_keys(parent, part, **keys):
    """Return an experiment in whose class a part has further keys, all of a number with default 0."""
    fields: dict[str, Any] = dict.fromkeys(keys, (int, 0))
    later: Any = create_model(part.__name__, __base__=part, **fields)
    fields = {parent: (later, later())}
    return create_model("Experiment", __base__=Experiment, **fields).parse({**BASE, parent: keys})


@pytest.mark.parametrize(("parent", "part"), [("training", TrainingSpec), ("record", RecordedOutcomes)])
def test_a_later_key_is_written_only_where_it_differs_from_its_default(parent, part):
    before = Experiment.parse(BASE)
    unused, used = (with_later_keys(parent, part, later=value) for value in (0, 1))
    assert unused.model_dump(mode="json") == before.model_dump(mode="json")
    assert unused.fingerprint("d") == before.fingerprint("d")
    assert used.model_dump(mode="json")[parent]["later"] == 1
    assert differences(before.canonical("d"), used.canonical("d")) == ([] if parent == "record" else ["training.later null -> 1"])


_FEATURES = "memtail.studies.features:feature_model"


@pytest.mark.parametrize(
    ("parts", "runs"),
    [
        ({}, False),
        ({"model": {"name": "cnn"}}, False),
        ({"model": {"name": "resnet9"}}, False),
        ({"model": {"name": "memtail.models.resnet:resnet9"}}, False),
        ({"model": {"name": "mine:build"}}, True),
        ({"model": {"name": "memtail_mine:build"}}, True),
        ({"model": {"name": _FEATURES, "options": {"model": {"name": "mine:build"}}}}, True),
        ({"trainer": {"function": "mine:train"}}, True),
        ({"trainer": {"command": ["train"]}}, True),
    ],
)
def test_functions_commands_and_networks_of_other_packages_are_user_code(parts, runs):
    assert Experiment.parse({**BASE, **parts}).runs_user_code is runs


def test_scores_alone_are_another_experiment_and_not_for_the_built_in_trainer(tmp_path):
    (tmp_path / "code.py").write_text("def train(task): ...")
    function = {**BASE, "trainer": {"function": "code:train", "folder": str(tmp_path)}}
    plain, scores, only = (Experiment.parse({**function, "record": {"scores": value}}) for value in (False, True, "only"))
    assert plain.fingerprint("d") == scores.fingerprint("d") != only.fingerprint("d")
    assert differences(scores.canonical("d"), only.canonical("d")) == ["record.scores null -> only"]
    assert Experiment.parse(yaml.safe_load(only.to_yaml())) == only
    with pytest.raises(SpecError, match=r"^experiment: record\.scores: only is for training code of your own; .* remove it$"):
        Experiment.parse({**BASE, "record": {"scores": "only"}})
    with pytest.raises(SpecError, match=r"^experiment: record\.scores: is auto, false, true or only \(got maybe\)$"):
        Experiment.parse({**function, "record": {"scores": "maybe"}})
    with pytest.raises(SpecError, match=r"^experiment: record\.scores: is auto, false, true or only"):
        Experiment.parse({**function, "record": {"scores": ["only"]}})


@pytest.mark.parametrize("value", [-1, 1.5, True, "some", [1]])
def test_a_number_of_kept_models_that_is_none_is_refused_in_one_line(value):
    with pytest.raises(SpecError, match=r"^experiment: record\.models: is a number of trials, 0 or more, or all( \(got [^;]*\))?$"):
        changed("record.models", value)
