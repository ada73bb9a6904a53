"""The benchmark's datasets and its settings A to H, over all letters and targets."""
from itertools import combinations, permutations

import pytest

import common

FINE_TUNE = ["mind", "pens", "goodreads", "books", "microlens", "netflix", "cds", "lastfm", "hm", "pog"]
TEST = ["mind", "goodreads", "movielens", "microlens", "cds", "hm", "electronics", "steam", "hotelrec", "yelp"]
DEMO = ["news-a", "news-b", "books-a", "books-b", "shop"]


def test_the_benchmark_has_15_datasets_in_10_domains():
    rows = common.DATASETS
    assert [name for name in rows if rows[name].test] == TEST
    assert [name for name in rows if rows[name].finetune] == FINE_TUNE
    assert len(rows) == 15 and len({row.domain for row in rows.values()}) == 10


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
    for order in permutations(train):
        assert common.setting_of(order, target) == letter


@pytest.mark.parametrize("names", [list(common.DATASETS), DEMO])
def test_every_choice_of_up_to_three_datasets_has_one_setting_for_every_target(names):
    domain = common.DOMAINS
    seen = set()
    for train in [*combinations(names, 0), *combinations(names, 1), *combinations(names, 2), *combinations(names, 3)]:
        for target in names:
            home = {name for name in train if domain[name] == domain[target]}
            n_domains = len({domain[name] for name in train})
            letters = {  # the table of settings, as statements of their own
                "A/B": not train,
                "C": train == (target,),
                "D": n_domains == 1 and home and target not in train,
                "E": n_domains == 1 and target in train and len(train) > 1,
                "F": n_domains == 1 and not home,
                "G": n_domains > 1 and target not in train,
                "H": n_domains > 1 and target in train}
            true = [letter for letter in letters if letters[letter]]
            assert true == [common.setting_of(train, target)]
            seen.update(true)
    assert seen == set(common.SETTINGS)


@pytest.mark.parametrize("train, target, letter", [
    (["mine"], "goodreads", "D"), (["mine", "other"], "goodreads", "G"), (["other"], "mine", "F")])
def test_datasets_of_ones_own_have_settings_too(train, target, letter):
    domains = {**common.DOMAINS, "mine": "book", "other": "cars"}
    assert common.setting_of(train, target, domains) == letter
