"""Preparation of a folder of images, killed and resumed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from memtail.datasets.folder import prepare_folder
from memtail.datasets.image_tree import find_images
from memtail.spec import DatasetSpec
from tests.support.arrays import write_tree


def test_a_killed_preparation_leaves_no_process_and_is_resumed(tmp_path):
    write_tree(tmp_path / "tree", count=4000)
    target = tmp_path / "prepared"
    script = tmp_path / "prepare.py"
    script.write_text(
        "import sys; from pathlib import Path; from memtail.datasets.folder import prepare_folder\n"
        "from memtail.datasets.image_tree import find_images; from memtail.spec import DatasetSpec\n"
        "root, target = map(Path, sys.argv[1:])\n"
        "spec = DatasetSpec(name='folder', root=root, resolution=32)\n"
        "if __name__ == '__main__': prepare_folder(find_images(root, None, None), spec, target, target / 'unusable.txt', None)"
    )
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "tree"), str(target)])
    children: list[str] = []
    while process.poll() is None and not any(path.stat().st_size for path in target.glob(".unfinished-*/journal.jsonl")):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() or children
        time.sleep(0.005)
    assert process.poll() is None
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a decoding process outlived its parent"
        time.sleep(0.05)
    steps: list[tuple[int, int]] = []
    tree, spec = find_images(tmp_path / "tree", None, None), DatasetSpec(name="folder", root=tmp_path / "tree", resolution=32)
    prepared = prepare_folder(tree, spec, target, tmp_path / "unusable.txt", lambda *step: steps.append(step))
    assert len(steps) < 16
    assert steps[-1] == (16000, 16000)
    fresh = prepare_folder(tree, spec, tmp_path / "fresh", tmp_path / "unusable.txt", None)
    assert prepared.name == fresh.name
