"""Scores of a real language model against an independent engine; skipped where it is not at hand.

    pip install lm-eval
    RECBENCH_LLM=FOLDER python -m pytest tests/test_real_models.py -s          (SmolLM2-135M-Instruct: a minute)
    RECBENCH_DATA=data adds prompts of the first users of data/movielens
"""
import os

import numpy as np
import pytest

import common

FOLDER = os.environ.get("RECBENCH_LLM")
FILMS = ["Toy Story (1995)", "Heat (1995)", "Casino (1995)", "Amélie (2001)", "Alien (1979)", "Up (2009)", "Jaws (1975)",
         "The Thing (1982)", 'He said "Hi" {n} twice', "Babe (1995)", "Brazil (1985)", "Rocky VI (1986) "]


def make_users():
    users = [{"user": str(n), "history": FILMS[n:n + 5], "candidates": FILMS[n + 5:] + FILMS[:n]} for n in range(3)]
    data = os.environ.get("RECBENCH_DATA")
    if data:
        movielens = common.read_dataset(data, "movielens", "test")
        users += [common.with_texts(user, movielens.items) for user in movielens.splits["test"][:10]]
    return users


@pytest.mark.skipif(not FOLDER, reason="RECBENCH_LLM: folder of a decoder-only model")
def test_scores_are_the_differences_of_log_likelihoods_of_another_engine():
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    parser = common.argument_parser("")
    parser.add_argument("--model")
    common.shared_arguments(parser)
    scorer = common.load_scorer(parser.parse_args(["--model", FOLDER, "--device", "cpu", "--dtype", "float32"]))
    users = make_users()
    scores = np.concatenate(common.score_prompts(scorer, users)[0])

    engine = huggingface.HFLM(pretrained=FOLDER, device="cpu", dtype="float32", batch_size=4)
    requests = []
    for user in users:
        for prompt in common.candidate_prompts(scorer.prompt, user["history"], user["candidates"]):
            for answer in scorer.prompt["answers"]:
                requests.append(instance.Instance("loglikelihood", {}, (prompt, answer), len(requests)))
    likelihoods = np.array([likelihood for likelihood, _ in engine.loglikelihood(requests, disable_tqdm=True)])
    want = likelihoods[0::2] - likelihoods[1::2]
    print(f"\n{len(want)} prompts, spread {want.std():.3f}, largest difference {np.abs(scores - want).max():.2g}")
    assert np.abs(scores - want).max() < 1e-4 and want.std() > 0.05
