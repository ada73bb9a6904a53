"""peers.py on a tiny model: the hand-written cache gives the same scores, and both ways of training start at one loss."""
import json

import peers
import test_evaluate
import tiny


def test_the_ways_agree(tmp_path, capsys):
    test_evaluate.write_dataset(tmp_path / "data", "mind", 9)
    argv = ["--model", tiny.build("llama", tmp_path / "model"), "--data", str(tmp_path / "data"), "--test", "mind",
            "--rounds", "1", "--device", "cpu"]
    peers.main(argv)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"case"')]
    ways = {(line["case"], line["way"]): line for line in lines}
    assert ways["score", "key-value cache"]["max_difference"] < 1e-5
    assert ways["train", "Trainer"]["max_difference"] < 1e-3
    assert ways["score", "key-value cache"]["tokens"] == ways["score", "this project"]["tokens"]
