"""Results of studies in a store: written whole, read back, and named in the error if damaged."""

import pyarrow.parquet
import pytest

from memtail.errors import StoreError
from memtail.storage import keys
from memtail.storage.local import LocalStore
from memtail.studies.result import StudyResult, load_results, write_result


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def write(store, study="stability", finding="0.9 ± 0.1"):
    from memtail.figures.style import drawing

    result = StudyResult(store, "e", study, "What holds", [finding], 8, ["e"], {"theta": 0.25}, {"jaccard": None})
    with drawing(3, 2) as figure:
        figure.subplots().plot([1, 2], [3, 4])
    write_result(result, {"t": [1, 2], "jaccard": [0.5, 0.75]}, figure)
    return result


def test_results_are_read_back_as_written_in_the_order_of_their_names(store):
    written = [write(store, study) for study in ("removal", "stability")]
    assert load_results(store, "e") == written
    assert load_results(store, "other") == []
    assert written[0].figure_svg().lstrip().startswith(b"<?xml")
    assert b"</svg>" in written[0].figure_svg()
    assert store.get(written[0].prefix + "figure.png").startswith(b"\x89PNG")
    assert pyarrow.parquet.read_table(store.local_path(written[0].prefix + "result.parquet")).to_pydict() == {
        "t": [1, 2],
        "jaccard": [0.5, 0.75],
    }


def test_a_repeated_study_replaces_its_result_and_draws_equal_bytes(store):
    figure = write(store).figure_svg()
    assert write(store, finding="0.8 ± 0.1").figure_svg() == figure
    assert [result.findings for result in load_results(store, "e")] == [["0.8 ± 0.1"]]


def test_an_incomplete_result_is_ignored_and_a_damaged_one_is_named(store):
    key = write(store).prefix + "result.json"
    store.delete(key)
    assert load_results(store, "e") == []
    for data in (b"{", b'{"schema": 1}', b"[]"):
        store.put(key, data)
        with pytest.raises(StoreError, match=r"studies/stability/result\.json: is damaged"):
            load_results(store, "e")
    store.put(key, b'{"schema": 7}')
    with pytest.raises(StoreError, match="is of schema 7"):
        load_results(store, "e")


def test_keys_of_studies_lie_below_the_experiment():
    assert keys.study("e", "removal").startswith(keys.studies("e"))
    assert keys.studies("e").startswith("experiments/e/")
