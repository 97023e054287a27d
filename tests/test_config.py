import json

import pytest
from brgsa_jax.configs import ablations

from brgsa_jax import config as configs
from brgsa_jax.config import UserError

RECIPES = [name for name in configs.recipes() if name != "ablations"]
VARIANTS = ["mgca:resnet50", "mgca:3d", "mgca_paper:resnet50", "phantom:siglip", "phantom:mgca",
            "phantom:brgsa_mgca"]
ABLATIONS = [f"ablations:{where}{name}" for name in ablations.ABLATIONS
             for where in ("", "phantom/")]


@pytest.mark.parametrize("name", [*RECIPES, *VARIANTS, *ABLATIONS])
def test_every_recipe_loads_validates_and_survives_json(name, tmp_path):
    config = configs.get_config(name)
    configs.validate(config)
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config))
    assert configs.load_json(path).to_dict() == config.to_dict()


def test_every_ablation_changes_what_its_name_says():
    for name, (recipe, changes) in ablations.ABLATIONS.items():
        base, config = (configs.flatten(configs.get_config(c)) for c in (
            recipe, f"ablations:{name}"))
        different = {key for key in base if base[key] != config[key]}
        assert different == {"name", *changes}, name
    with pytest.raises(UserError, match="did you mean 'no_bank'"):
        configs.get_config("ablations:no_bnk")
    with pytest.raises(UserError, match="choices: .*no_cta"):
        configs.get_config("ablations")


@pytest.mark.parametrize(("changes", "message"), [
    ({"losses.knowledge_interaction.positives": ("captions",)}, "did you mean 'caption'"),
    ({"model.bank.rows": 0}, "needs a bank"),
    ({"train.parallel": "pmapp"}, "did you mean 'pmap'"),
    ({"model.batch_statistics": "locl"}, "did you mean 'local'"),
    ({"losses.knowledge_interaction.temperature": 0.0}, "model.logit.scale"),
    ({"data.crop": (64, 64)}, "three positive whole numbers"),
    ({"model.vision.patch": ("a", 16, 8)}, "model.vision.patch=.* three positive whole numbers"),
    ({"model.vision.patch": (16.0, 16, 8)}, "model.vision.patch=.* three positive whole numbers"),
    ({"model.vision.patch": (16, 0, 8)}, "model.vision.patch=.* three positive whole numbers"),
    ({"model.input.spacing": (1.0, "b", 1)}, "model.input.spacing=.* three positive numbers"),
    ({"model.input.spacing": (1.0, float("inf"), 1)}, "model.input.spacing=.* three positive num"),
    ({"model.input.shape": (64, None, 32)}, "model.input.shape=.* three positive whole numbers"),
    ({"model.input.window": ("a", "b")}, "a window is .low, high. in HU"),
    ({"model.input.window": ((-1000, 1000), 5)}, "model.input.window has 5; a window is"),
    ({"model.input.window": (-1000, float("nan"))}, "a window is .low, high. in HU"),
    ({"model.input.window": (1000, -1000)}, "a window is .low, high. in HU"),
    ({"model.vision.stem": (4, 4, 4)}, "model.vision.stem has 4; each stage is .size, features."),
    ({"model.vision.stem": ((4, 4, 4), 32)}, "stem has .4, 4, 4.; each stage is .size, features."),
    ({"model.vision.stem": (((4, 4), 32),)}, "each stage is .size, features."),
    ({"model.vision.stem": (((4, 4, 0), 32),)}, "each stage is .size, features."),
    ({"model.vision.stem": (((4, 4, 4), "x"),)}, "each stage is .size, features."),
    ({"model.vision.stem": (((4, 4, 4), 0),)}, "as in model.vision.stem=...2, 2, 2., 32.,."),
    ({"model.vision.stem": (((4, 4, 3), 32),)}, r"stages of \(4, 4, 3\) cells, which do not "
                                                r"divide \(16, 16, 8\)"),
    ({"model.vision.stem": (((4, 4, 4), 32), ((2, 2, 4), 64))}, r"do not divide \(4, 4, 2\)"),
    ({"optim.freeze": ("(",)}, "optim.freeze has '.' .*; each entry is a regex"),
    ({"optim.freeze": (("bank", 1),)}, "optim.freeze has .'bank', 1. .*; each entry is a regex"),
    ({"losses.knowledge_interaction.positives": (1,)}, "choices: caption"),
    ({"losses.knowledge_interaction.contrast": -1.0}, "must not be negative"),
    ({"model.words.attention_of": "nxt"}, "did you mean 'next'"),
    ({"optim.start": ("bank", "1epochs")}, "each entry is .regex, duration."),
    ({"optim.start": (("(", "1epochs"),)}, "each entry is .regex, duration."),
    ({"optim.start": (("bank", -3),)}, "-3 is negative"),
    ({"optim.groups": (("bank", "a"),)}, "each entry is .regex, factor."),
    ({"optim.betas": ("a", "b")}, "two numbers in"),
    ({"optim.plateau_factor": 2.0}, "plateau_factor"),
    ({"optim.learning_rate": -1.0}, "must be positive"),
    ({"optim.floor": 1.0}, "optim.floor"),
    ({"model.text.last_n_layers": 0}, "at least 1"),
    ({"train.keep_checkpoints": 0}, "at least 1"),
])
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configs.validate(configs.get_config("phantom", **changes))


def test_a_stem_may_take_the_patch_in_several_stages():
    for stem in ((), (((4, 4, 4), 32), ((4, 2, 2), 64)), (((16, 16, 8), 32),)):
        configs.validate(configs.get_config("phantom", **{"model.vision.stem": stem}))


def test_token_and_prototype_losses_say_what_they_need():
    for key, value, message in (("losses.token_alignment.low", -1.0, "quantiles"),
                                ("losses.token_alignment.word_weights", "foo", "uniform"),
                                ("losses.info_nce.reduction", "max", "did you mean|choices"),
                                ("losses.prototype_alignment.epsilon", 0.0, "must be positive"),
                                ("losses.prototype_alignment.codes", "loc", "local"),
                                ("model.local_head.name", "", "projected tokens"),
                                ("model.prototypes", 0, "model.prototypes"),
                                ("model.cross_attention_heads", 5, "does not divide")):
        with pytest.raises(UserError, match=message):
            configs.validate(configs.get_config("phantom:mgca", **{key: value}))


def test_a_recipe_without_argument_says_so():
    with pytest.raises(UserError, match="'brgsa_paper' takes no argument, and '3d' was given"):
        configs.get_config("brgsa_paper:3d")


@pytest.mark.parametrize("name", ["brgsa", "clip", "siglip", "brgsa_mgca"])
def test_unknown_towers_are_named(name):
    with pytest.raises(UserError, match="'resnet3d5'.*did you mean 'resnet3d50'"):
        configs.get_config(f"{name}:resnet3d5")


def test_the_name_can_be_changed():
    assert configs.get_config("clip", **{"name": "mine"}).name == "mine"


def test_a_typo_is_refused_with_the_nearest_names():
    with pytest.raises(UserError, match=r"'train.stps'; did you mean 'train.steps'"):
        configs.get_config("phantom", **{"train.stps": 3})
    with pytest.raises(UserError, match="did you mean 'phantom'"):
        configs.get_config("phantm")
    with pytest.raises(AttributeError):
        _ = configs.get_config("phantom").optim.learning_rat
    with pytest.raises((AttributeError, KeyError)):
        configs.get_config("phantom").optim.learning_rat = 1.0


def test_all_mistakes_come_in_one_message():
    with pytest.raises(UserError) as caught:
        configs.get_config("phantom", **{"train.stps": 3, "optim.lr": 1, "train.steps": "many"})
    assert all(key in str(caught.value) for key in ("train.stps", "optim.lr", "train.steps='many'"))


def test_overrides_keep_the_type():
    config = configs.get_config("phantom", **{
        "optim.learning_rate": "3", "optim.warmup": "2epochs", "data.crop": "(32, 32, 16)",
        "losses.knowledge_interaction.positives": "('report',)", "model.bank.frozen": "true"})
    assert config.optim.learning_rate == 3.0 and isinstance(config.optim.learning_rate, float)
    assert config.optim.warmup == "2epochs"
    assert configs.get_config("phantom", **{"optim.warmup": "300"}).optim.warmup == 300
    assert config.data.crop == (32, 32, 16)
    assert config.losses.knowledge_interaction.positives == ("report",)
    assert config.model.bank.frozen is True
    for bad in ({"train.steps": 1.5}, {"model.bank.frozen": 3}, {"optim.warmup": "soon"}):
        with pytest.raises(UserError):
            configs.get_config("phantom", **bad)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--config.a.b=1"], {"a.b": "1"}), (["--config.a", "x=y"], {"a": "x=y"})])
def test_command_line_overrides(arguments, expected):
    assert configs.parse_overrides(arguments) == expected


@pytest.mark.parametrize("arguments", [["--confg.a=1"], ["--config.a"], ["a"]])
def test_wrong_command_line_overrides(arguments):
    with pytest.raises(UserError):
        configs.parse_overrides(arguments)


@pytest.mark.parametrize(("text", "steps"), [(7, 7), ("7steps", 7), ("5%", 50), ("2epochs", 60),
                                             ("0.5epochs", 15)])
def test_durations(text, steps):
    assert configs.steps_of(text, total=1000, per_epoch=30) == steps


def test_validation_lists_everything_that_does_not_fit():
    config = configs.get_config("phantom", **{
        "model.vision.heads": 5, "data.crop": (30, 64, 32), "data.batch_size": 1,
        "model.bank.rows": 0})
    with pytest.raises(UserError) as caught:
        configs.validate(config)
    for part in ("model.vision.width", "data.crop", "data.batch_size", "model.bank.rows"):
        assert part in str(caught.value)


def test_a_user_file_is_a_recipe_and_json_runs_nothing(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from brgsa_jax.config import get_config as g\n"
                    "def get_config(arg=''):\n    return g('phantom', **{'seed': int(arg or 1)})\n")
    assert configs.get_config(f"{file}:5").seed == 5
    with pytest.raises(UserError, match="does not exist"):
        configs.get_config(str(tmp_path / "none.py"))
    broken = tmp_path / "config.json"
    broken.write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        configs.get_config(str(broken))


@pytest.mark.parametrize(("change", "part"), [
    ({"model.vision.heads": 0}, "must be positive"), ({"model.dtype": "f99"}, "model.dtype"),
    ({"model.input.window": ()}, "model.input.window"), ({"seed": -1}, "must not be negative"),
    ({"model.text.max_tokens": 97}, "exceeds model.text.positions"),
    ({"losses.knowledge_interaction.negatives": "zz"}, "negatives"),
    ({"losses.knowledge_interaction.temperature": 0.0}, "temperature"),
    ({"optim.groups": (("[", 0.1),)}, "optim.groups"), ({"optim.ema": 2.0}, "optim.ema")])
def test_values_that_cannot_work_are_refused_before_anything_starts(change, part):
    with pytest.raises(UserError, match=part):
        configs.validate(configs.get_config("phantom", **change))


def test_intervals_may_be_epochs():
    config = configs.get_config("phantom", **{"train.steps": "20epochs",
                                              "train.eval_every": "1epochs",
                                              "train.checkpoint_every": "5%"})
    assert configs.train_durations(config, 30) == {
        "train.steps": 600, "train.log_every": 10, "train.eval_every": 30,
        "train.checkpoint_every": 30}
    with pytest.raises(UserError, match="no number of steps"):
        configs.train_durations(configs.get_config("phantom", **{"train.steps": "5%"}), 30)
