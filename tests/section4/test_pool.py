"""The data of Fig. 10: equal counts of the same edits, filtered and not, from one pool."""

import json

from conftest import colourful, contents

from dataset import EditDataset, Pair, read_metadata, write_edit, write_seeds
from section4 import pool


def test_both_sets_have_as_many_pairs_of_the_same_edits(tmp_path):
    """Of the first edit's six candidates three pass, of which two are kept; of the second's none."""
    (tmp_path / "clip").mkdir()
    thresholds = {"image_text": 0.2, "image_image": 0.7, "direction": 0.2}
    (tmp_path / "clip" / "filter.json").write_text(json.dumps(thresholds))
    for number, directions in enumerate([(0.1, 0.3, 0.5, 0.0, 0.4, 0.1), (0.1, 0.0), (0.9,)]):
        scores, pairs = {"clip_sim_0": 0.3, "clip_sim_1": 0.3, "clip_sim_image": 0.8}, []
        for i, direction in enumerate(directions):
            metadata = {"seed": 10 * number + i, **scores, "clip_sim_dir": direction}
            pairs.append(Pair(colourful(16, 16, i), colourful(16, 16, i + 9), metadata))
        write_edit(tmp_path / "pool", number, {"caption": "a", "edit": f"{number}", "output": "b", "url": None}, pairs)
    write_seeds(tmp_path / "pool")
    arguments = [str(tmp_path / "pool"), f"--out={tmp_path}/out", f"--clip={tmp_path}/clip", "--keep=2"]
    pool.main(arguments)
    seeds = {}
    for name in ("filtered", "random"):
        folders = sorted((tmp_path / "out" / name).glob("0*"))
        assert [path.name for path in folders] == ["0000000", "0000002"]
        seeds[name] = [sorted(line["seed"] for line in read_metadata(path / "metadata.jsonl")) for path in folders]
        assert len(EditDataset(tmp_path / "out" / name, "all")) == 2
    assert seeds["filtered"] == [[2, 4], [20]]
    assert [len(some) for some in seeds["random"]] == [2, 1]
    before = contents(tmp_path / "out")
    pool.main(arguments)  # after a stop it resumes, and draws the same
    assert contents(tmp_path / "out") == before
