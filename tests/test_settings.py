"""The benchmark table and its eight settings, over all letters and targets."""
import itertools

import pytest

import common
import finetune

FINE_TUNE = ["mind", "pens", "goodreads", "books", "microlens", "netflix", "cds", "lastfm", "hm", "pog"]
TEST = ["mind", "goodreads", "movielens", "microlens", "cds", "hm", "electronics", "steam", "hotelrec", "yelp"]
DOMAINS = [("mind", "pens"), ("goodreads", "books"), ("microlens", "netflix"), ("cds", "lastfm"), ("hm", "pog")]
DEMO = ["news-a", "news-b", "books-a", "books-b", "shop"]
ONLY_TESTED = [name for name in TEST if name not in FINE_TUNE]


def test_the_benchmark_has_15_datasets_in_10_domains():
    assert [name for name, row in common.DATASETS.items() if row.test] == TEST
    assert [name for name, row in common.DATASETS.items() if row.finetune] == FINE_TUNE
    assert len(common.DATASETS) == 15 and len({row.domain for row in common.DATASETS.values()}) == 10
    assert list(common.SETTINGS) == list("ABCDEFGH") and list(common.DEMO) == DEMO


@pytest.mark.parametrize("train, target, letter", [
    ([], "mind", "B"),
    (["mind"], "mind", "C"),
    (["mind", "mind"], "mind", "C"),
    (["pens"], "mind", "D"),
    (["pens", "mind"], "mind", "E"),
    (["books"], "mind", "F"),
    (["books"], "yelp", "F"),
    (["books", "goodreads"], "mind", "G"),  # several sets of one other domain
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
    assert common.setting_of(train, target, single=True) == letter.replace("B", "A")


def test_setting_of_every_choice_of_up_to_three_datasets_and_every_target():
    domain = {name: row.domain for name, row in {**common.DATASETS, **common.DEMO}.items()}
    seen = set()
    for universe in (common.DATASETS, DEMO):
        for train in (set(c) for n in range(4) for c in itertools.combinations(universe, n)):
            for target in universe:
                home = {name for name in train if domain[name] == domain[target]}
                letters = {  # the rows of the table of settings, as statements of their own
                    "B": not train,
                    "C": train == {target},
                    "D": train and train == home and target not in train,
                    "E": train == home and target in train and len(train) > 1,
                    "F": len(train) == 1 and not home,
                    "G": len(train) > 1 and train != home and target not in train,
                    "H": train != home and target in train}
                assert [common.setting_of(train, target)] == [letter for letter, true in letters.items() if true]
                seen.add(common.setting_of(train, target))
    assert seen == set("BCDEFGH")


@pytest.mark.parametrize("target, partner", [pair for a, b in DOMAINS for pair in ((a, b), (b, a))])
def test_sets_for_a_target_that_can_be_trained_on(target, partner):
    sets = lambda letter: common.training_sets(letter, target)
    assert sets("A") == sets("B") == []
    assert sets("C") == [target] and sets("D") == [partner]
    assert sorted(sets("E")) == sorted([target, partner])
    assert sets("G") == [name for name in FINE_TUNE if name != target] and sets("H") == FINE_TUNE


@pytest.mark.parametrize("target", ONLY_TESTED)
def test_sets_for_a_target_that_is_only_tested(target):
    assert common.training_sets("A", target) == common.training_sets("B", target) == []
    assert common.training_sets("G", target) == FINE_TUNE
    for letter in "CDEH":
        with pytest.raises(common.UserError, match=f"setting {letter} .* does not exist for {target}"):
            common.training_sets(letter, target)


def test_sets_of_the_demo():
    sets = common.training_sets
    assert sets("C", "news-a") == ["news-a"] and sets("D", "news-a") == ["news-b"] and sets("E", "news-a") == DEMO[:2]
    assert sets("G", "books-b") == ["news-a", "news-b", "books-a", "shop"] and sets("H", "books-b") == DEMO
    assert sets("C", "shop") == ["shop"] and sets("G", "shop") == DEMO[:4] and sets("H", "shop") == DEMO
    for letter in "DE":
        with pytest.raises(common.UserError, match=f"setting {letter} .* does not exist for shop.*shop"):
            sets(letter, "shop")


@pytest.mark.parametrize("target", [*common.DATASETS, *common.DEMO])
def test_sets_are_the_largest_that_the_letter_allows(target):
    """setting_of gives the letter back, and with any further dataset it would be another one."""
    universe = common.DEMO if target in common.DEMO else common.DATASETS
    for letter in "ABCDEGH":
        try:
            sets = common.training_sets(letter, target)
        except common.UserError:
            continue
        assert common.setting_of(sets, target, single=letter == "A") == letter
        for more in universe:
            if universe[more].finetune and more not in sets:
                assert common.setting_of([*sets, more], target) != letter


def test_what_cannot_be_chosen_is_said_in_one_line():
    for letter, target, words in [("F", "mind", "name it with --train .not mind, pens"), ("I", "mind", "A, B, C, D, E"),
                                  ("E", "minds", "unknown dataset 'minds'.*mind, pens.*shop")]:
        with pytest.raises(common.UserError, match=words) as error:
            common.training_sets(letter, target)
        assert "\n" not in str(error.value)
    for call in (lambda: common.setting_of(["nobody"], "mind"), lambda: common.setting_of([], "nobody"),
                 lambda: common.check_names(["mind", "nobody"])):
        with pytest.raises(common.UserError, match="unknown dataset 'nobody'"):
            call()


def test_check_names_keeps_the_order_and_drops_repeats():
    assert common.check_names(["pens", "mind", "pens", "shop"]) == ["pens", "mind", "shop"]
    assert common.check_names([]) == []


def train_of(*flags):
    """The datasets that finetune.py trains on, given these flags."""
    return finetune.arguments(["--model", "m", "--out", "o", *flags]).train


@pytest.mark.parametrize("letter, target, names", [
    ("C", "mind", ["mind"]), ("D", "mind", ["pens"]), ("E", "mind", ["mind", "pens"]), ("G", "yelp", FINE_TUNE),
    ("H", "shop", DEMO)])
def test_finetune_takes_a_letter_for_the_sets(letter, target, names):
    assert train_of("--setting", letter, "--target", target) == train_of("--train", *names) == names


def test_finetune_takes_setting_f_with_its_set():
    assert train_of("--setting", "F", "--target", "mind", "--train", "books") == ["books"]


@pytest.mark.parametrize("flags, words", [
    ("--setting F --target mind", "name it with --train"),
    ("--setting F --target mind --train pens", "setting F .* for mind is not training on pens"),
    ("--setting F --target mind --train books cds", "setting F .* is not training on books, cds"),
    ("--setting E --target mind --train mind pens", "either --train"),
    ("--setting E", "--target"),
    ("--setting C --target yelp", "setting C .* does not exist for yelp"),
    ("--setting A --target mind", "setting A .* trains on nothing"),
    ("--train mind --valid-metric logloss", "logloss"),
    ("", "either --train"),
])
def test_finetune_says_what_is_wrong_with_a_setting(flags, words):
    with pytest.raises(common.UserError, match=words):
        train_of(*flags.split())
