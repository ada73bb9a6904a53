"""The benchmark table and its eight settings, over all letters and targets."""
import itertools

import pytest

import common

FINE_TUNE = ["mind", "pens", "goodreads", "books", "microlens", "netflix", "cds", "lastfm", "hm", "pog"]
TEST = ["mind", "goodreads", "movielens", "microlens", "cds", "hm", "electronics", "steam", "hotelrec", "yelp"]
DEMO = ["news-a", "news-b", "books-a", "books-b", "shop"]


def test_the_benchmark_has_15_datasets_in_10_domains():
    assert [name for name, row in common.DATASETS.items() if row.test] == TEST
    assert [name for name, row in common.DATASETS.items() if row.finetune] == FINE_TUNE
    assert len(common.DATASETS) == 15 and len({row.domain for row in common.DATASETS.values()}) == 10
    assert list(common.SETTINGS) == ["A/B", *"CDEFGH"] and list(common.DEMO) == DEMO


@pytest.mark.parametrize("train, target, letter", [
    ([], "mind", "A/B"),
    (["mind"], "mind", "C"),
    (["mind", "mind"], "mind", "C"),
    (["pens"], "mind", "D"),
    (["pens", "mind"], "mind", "E"),
    (["books"], "mind", "F"),
    (["books"], "yelp", "F"),
    (["books", "goodreads"], "mind", "F"),  # several sets of one other domain
    (["mind", "pens"], "hm", "F"),
    (["books", "pens"], "mind", "G"),  # the target's domain among several
    (["cds", "books", "hm", "mind"], "movielens", "G"),
    (["mind", "books"], "mind", "H"),
    (["books", "pens", "mind"], "mind", "H"),
    (["news-b", "news-a"], "news-a", "E"),
    (["shop"], "news-a", "F"),
])
def test_setting_of_examples(train, target, letter):
    for order in itertools.permutations(train):
        assert common.setting_of(order, target) == letter


def test_setting_of_every_choice_of_up_to_three_datasets_and_every_target():
    domain = {**{name: row.domain for name, row in common.DATASETS.items()}, **common.DEMO}
    seen = set()
    for universe in (common.DATASETS, DEMO):
        for train in (set(c) for n in range(4) for c in itertools.combinations(universe, n)):
            for target in universe:
                home = {name for name in train if domain[name] == domain[target]}
                letters = {  # the rows of the table of settings, as statements of their own
                    "A/B": not train,
                    "C": train == {target},
                    "D": train and train == home and target not in train,
                    "E": train == home and target in train and len(train) > 1,
                    "F": len({domain[name] for name in train}) == 1 and not home,
                    "G": len({domain[name] for name in train}) > 1 and target not in train,
                    "H": train != home and target in train}
                assert [common.setting_of(train, target)] == [letter for letter, true in letters.items() if true]
                seen.add(common.setting_of(train, target))
    assert seen == {"A/B", *"CDEFGH"}


def test_domains_of_datasets_of_ones_own():
    domains = common.domains_of({"mine": {"domain": "book"}, "other": {"domain": "cars"}})
    assert common.setting_of(["mine"], "goodreads", domains) == "D"
    assert common.setting_of(["mine", "other"], "goodreads", domains) == "G"
    assert common.setting_of(["other"], "mine", domains) == "F"
