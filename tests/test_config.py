"""The command line and its files: precedence, errors, presets."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import run

from iris_fast.__main__ import COMMANDS
from iris_fast.cli import make_parser, parse
from iris_fast.config import (
    PRESETS,
    SECTIONS,
    GenerateConfig,
    TrainConfig,
    defaults,
    sections,
    to_yaml,
)
from iris_fast.errors import UserError
from iris_fast.rewards.table import REWARDS

ROOT = Path(__file__).parent.parent
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


def train_config(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, "iris_fast.train", list(arguments))


@pytest.fixture
def yaml_file(here: Path):
    def write(text: str) -> str:
        (here / "settings.yaml").write_text(text)
        return "settings.yaml"

    return write


def test_the_default_is_the_tiny_preset():
    config = train_config()
    assert (config.preset, config.model, config.prompts) == ("tiny", "tiny", None)
    assert config.max_steps == PRESETS["tiny"]["max_steps"] != TrainConfig.max_steps


def test_precedence_is_defaults_preset_file_flags(yaml_file):
    file = yaml_file("max_steps: 7\nlearning_rate: 1e-5\nbeta: 0.5\n")
    config = train_config("--preset", "tiny", "--config", file, "--beta", "0.25")
    assert config.beta == 0.25  # flag over file
    assert config.max_steps == 7  # file over preset (60)
    assert config.learning_rate == 1e-5  # a number here, although text in YAML 1.1
    assert config.max_completion_length == 24  # preset over default (256)
    assert config.epsilon == 0.2  # default


@pytest.mark.parametrize("config_flag", [["--config", "settings.yaml"], ["--config=settings.yaml"]])
def test_a_flag_wins_over_a_file_that_comes_after_it(yaml_file, config_flag):
    yaml_file("beta: 0.5\n")
    assert train_config("--beta", "0.25", *config_flag).beta == 0.25


def test_the_later_of_two_files_wins(here):
    Path("a.yaml").write_text("beta: 0.5\nepsilon: 0.1\n")
    Path("b.yaml").write_text("beta: 0.25\n")
    config = train_config("--config", "a.yaml", "--config", "b.yaml")
    assert (config.beta, config.epsilon) == (0.25, 0.1)


def test_a_folder_in_a_file_may_be_named_like_a_date(yaml_file):
    assert (
        train_config("--config", yaml_file("output_dir: 2026-01-31\n")).output_dir == "2026-01-31"
    )


def test_a_file_may_name_the_preset_and_a_flag_another(yaml_file):
    file = yaml_file("preset: janus-pro-1b\nprompts: p.txt\nmax_steps: 3\n")
    config = train_config("--config", file)
    assert (config.model, config.bf16, config.max_steps) == ("deepseek-ai/Janus-Pro-1B", True, 3)
    assert train_config("--config", file, "--preset", "tiny").model == "tiny"


@pytest.mark.parametrize("preset", ["janus-pro-1b", "janus-pro-7b"])
def test_janus_presets_have_the_papers_hyperparameters(preset):
    config = train_config("--preset", preset, "--prompts", "p.txt")
    paper = {
        "learning_rate": 1e-6,
        "beta": 0.01,
        "num_generations": 8,
        "cfg_weight": 5.0,
        "temperature": 1.0,
        "top_k": 0,
        "max_steps": 800,
        "cot": True,
        "reward_reduction": "sum",
    }
    assert {name: getattr(config, name) for name in paper} == paper
    assert config.reward_funcs == ["image_nsc", "text_nsc"]
    assert config.prompts_per_step == 8


@pytest.mark.parametrize(
    ("arguments", "wrong", "near"),
    [
        (["--lerning_rate", "3"], "lerning_rate", "learning_rate"),
        (["--lerning_rate=3"], "lerning_rate", "learning_rate"),
        (["--max_step", "3"], "max_step", "max_steps"),  # no abbreviations either
        (["--num-generations", "3"], "num-generations", "num_generations"),
        (["--resume_from_chekpoint", "true"], "resume_from_chekpoint", "resume_from_checkpoint"),
        (["--config", "settings.yaml"], "max_step", "max_steps"),
        (["--config=settings.yaml"], "max_step", "max_steps"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(yaml_file, arguments, wrong, near):
    yaml_file("max_step: 3\n")
    with pytest.raises(UserError, match=f"^{wrong}: .*did you mean {near}") as refusal:
        train_config(*arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("word", ["seed", "p.txt", "-seed"])
def test_a_word_without_dashes_is_refused(word):
    with pytest.raises(UserError, match=f"^{re.escape(word)}: not a setting; write --NAME VALUE"):
        train_config(word, "3")


def test_a_name_without_a_near_match_points_to_help():
    with pytest.raises(UserError, match=r"^xyzzy: there is no such setting; --help lists them"):
        train_config("--xyzzy", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "abc"], "learning_rate: abc is not valid; give a number"),
        (["--num_generations", "2.5"], "num_generations: 2.5 is not valid; give a whole number"),
        (["--cot", "maybe"], "cot: maybe is not valid; give true or false"),
        (["--cot"], "cot: no value given.*--cot true"),
        (["--loss_type", "grop"], "loss_type: grop .*choose from grpo, bnpo, dr_grpo, dapo"),
        (["--preset", "tinyy"], "preset: tinyy .*choose from tiny, janus-pro-1b"),
        (
            ["--reward_funcs", "random"],
            r"reward_funcs: random is not valid; give a list of str, such as \[random\]",
        ),
        (
            ["--reward_weights", "[1, x]"],
            r"reward_weights: \[1, x\] is not valid; give a list of float",
        ),
        (
            ["--reward_weights", "[1, 1]"],
            "reward_weights.*one finite number for each of image_nsc",
        ),
        (["--reward_weights", "[.nan, 1]"], r"reward_weights: \[nan, 1.0\]"),
        (["--reward_funcs", "[random, random]"], "reward_funcs: random is named twice"),
        (["--reward_funcs", "[]"], "reward_funcs: .*at least one"),
        (["--cot", "false", "--reward_funcs", "[text_nsc]"], "reward_funcs: text_nsc.*--cot true"),
        (
            ["--objective", "direct", "--reward_funcs", "[image_nsc, random]"],
            "objective: direct .*random has no gradient; choose .*image_nsc.*--objective grpo",
        ),
        (
            ["--objective", "direct", "--reward_distribution", "guided"],
            "reward_distribution: guided is .*--objective direct supports conditional only",
        ),
        (["--max_steps", "0"], "max_steps: 0 .*>= 1"),
        (["--num_generations", "1"], "num_generations: 1 .*>= 2: an advantage compares"),
        (["--temperature", "0"], "temperature: 0"),
        (["--temperature", "-1"], "temperature: -1"),
        (["--top_p", "0"], "top_p: 0.*> 0 and <= 1; 1 is off"),
        (["--min_p", "1.5"], "min_p: 1.5 .*>= 0 and <= 1"),
        (["--learning_rate=-1e-6"], "learning_rate: -1e-06 .*>= 0"),
        (["--learning_rate", "inf"], "learning_rate: .*inf"),
        (["--image_token_num_per_image", "1"], "image_token_num_per_image: 1 .*square"),
        (["--adam_beta2", "1"], "adam_beta2: 1"),
        (["--adam_beta1=-0.5"], "adam_beta1: -0.5"),
        (["--cfg_weight", "nan"], "cfg_weight: .*nan"),
        (["--image_token_num_per_image", "500"], "image_token_num_per_image: 500.*square"),
        (["--model", "somewhere"], "prompts: --model somewhere needs a prompt file"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint: .*--output_dir"),
        (["--config", "absent.yaml"], "config: .*absent.yaml"),
        (["--config", "list.yaml"], "config: list.yaml has no settings in it"),
        (["--config", "empty.yaml"], "config: empty.yaml has no settings in it"),
        (["--config", "broken.yaml"], "config: broken.yaml is not valid YAML .*line 2"),
        (["--config", "binary.yaml"], "config: binary.yaml is not valid YAML"),
        (["--config", "preset.yaml"], "preset: .*tiny"),
        (["--config", "null.yaml"], "reward_reduction: no value given; write .*or delete the line"),
        (["--config=null.yaml"], "reward_reduction: no value given; write .*or delete the line"),
        (["--config", "mistyped.yaml"], "max_step: .*did you mean max_steps"),
        (["--config", "number.yaml"], "1: there is no such setting"),
        (["--config", "nested.yaml"], "seed: {'a': 1} is not valid; give a whole number"),
        (["--config", "anchor.yaml"], "reward_funcs: .*is not valid; give a list of str"),
        (["--epsilon_high", "nan"], "epsilon_high: nan is not valid; give a number"),
    ],
)
def test_an_invalid_value_is_reported_with_its_setting(here, arguments, message):
    Path("list.yaml").write_text("- a\n")
    Path("empty.yaml").write_text("")
    Path("broken.yaml").write_text("seed: 1\nmax_steps: [3\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    Path("preset.yaml").write_text("preset: [tiny]\n")
    Path("null.yaml").write_text("seed: 1\nreward_reduction:\n")
    Path("mistyped.yaml").write_text("max_step:\nseed: 1\n")
    Path("number.yaml").write_text("1: 2\n")
    Path("nested.yaml").write_text("seed: {a: 1}\n")
    Path("anchor.yaml").write_text("reward_funcs: &here [*here]\n")
    with pytest.raises(UserError, match=message) as refusal:
        train_config(*arguments)
    assert "\n" not in str(refusal.value)


def test_booleans_are_written_true_and_false():
    assert train_config("--cot", "true").cot is True
    assert train_config("--cot=false").cot is False


def test_rewards_follow_cot_unless_named():
    paper = ["--preset", "janus-pro-1b", "--prompts", "p.txt"]
    assert train_config(*paper, "--cot", "false").reward_funcs == ["image_nsc"]
    assert train_config(*paper, "--cot", "true").reward_weights == [1.0, 1.0]
    named = train_config("--reward_funcs", "[image_entropy, random]", "--reward_weights", "[-1, 2]")
    assert (named.reward_funcs, named.reward_weights) == (["image_entropy", "random"], [-1.0, 2.0])


def test_greedy_generation_may_have_temperature_0_and_training_not():
    assert parse(GenerateConfig, "g", ["--temperature", "0"]).temperature == 0
    with pytest.raises(UserError, match=r"save_codes: codes.npy .*npz"):
        parse(GenerateConfig, "g", ["--save_codes", "codes.npy"])
    with pytest.raises(UserError, match="batch_size: 0"):
        parse(GenerateConfig, "g", ["--batch_size", "0"])


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_null_is_valid_only_for_settings_that_may_be_none(here, config_class):
    for field in dataclasses.fields(config_class):
        Path("null.yaml").write_text(f"{field.name}: null\n")
        if "None" in str(field.type):
            found = parse(config_class, "p", ["--config", "null.yaml"])
            if config_class is TrainConfig and field.name in PRESETS["tiny"]:
                assert getattr(found, field.name) == getattr(config_class(cot=True), field.name)
            else:
                assert found == parse(config_class, "p", [])
        else:
            with pytest.raises(UserError, match=f"^{field.name}: no value given"):
                parse(config_class, "p", ["--config", "null.yaml"])


@pytest.mark.parametrize("preset", list(PRESETS))
def test_yaml_reads_back_to_the_same_settings(here, preset):
    odd = ["--prompts", "odd: name #1.txt", "--seed", "7", "--epsilon_high", "0.3"]
    config = train_config("--preset", preset, *odd)
    Path("config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert train_config("--config", "config.yaml") == config


def test_print_config_reads_back_to_the_same_settings(here):
    arguments = ["--preset", "janus-pro-7b", "--prompts", "p.jsonl", "--beta", "0.5"]
    printed = run("iris_fast.train", *arguments, "--print_config", cwd=here)
    assert (printed.code, printed.err) == (0, "")
    Path("config.yaml").write_text(printed.out)
    assert train_config("--config", "config.yaml") == train_config(*arguments)
    assert yaml.safe_load(printed.out)["beta"] == 0.5


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_every_setting_has_a_help_text(config_class):
    helps = {action.dest: action.help for action in make_parser(config_class, "p")._actions}
    for field in dataclasses.fields(config_class):
        assert len(helps[field.name] or "") > 10, field.name


def test_help_lists_all_settings_by_section(here):
    shown = run("iris_fast.train", "--help", cwd=here)
    assert shown.code == 0
    place = 0
    for title, names in sections(TrainConfig).items():
        place = shown.out.index(f"\n{title}:\n", place)
        for name in names:
            place = shown.out.index(f"\n  --{name} ", place)
    listed = [name for names in sections(TrainConfig).values() for name in names]
    assert sorted(listed) == sorted(defaults(TrainConfig))


def test_every_section_starts_at_a_setting():
    assert SECTIONS.keys() <= defaults(TrainConfig).keys() | defaults(GenerateConfig).keys()
    assert "" not in sections(TrainConfig) | sections(GenerateConfig)


def test_help_shows_the_defaults_of_the_preset(here):
    shown = run("iris_fast.train", "--preset", "janus-pro-7b", "--beta", "3", "--help", cwd=here)
    words = " ".join(shown.out.split())
    assert "(type: str, default: deepseek-ai/Janus-Pro-7B)" in words
    assert "0: no reference model. (type: float, default: 0.01)" in words


def test_the_settings_page_is_current():
    page = runpy.run_path(str(ROOT / "docs" / "render_settings.py"))
    assert page["TARGET"].read_text(encoding="utf-8") == page["render"](), (
        "run `python docs/render_settings.py`"
    )


def test_an_unknown_option_of_print_config_is_refused():
    with pytest.raises(UserError, match="xyzzy"):
        train_config("--print_config=xyzzy")


# --- The config.yaml of a training run, for other commands ----------------------------------------


def generate_config(*arguments: str) -> GenerateConfig:
    return parse(GenerateConfig, "iris_fast.generate", list(arguments))


def test_generate_takes_what_it_shares_with_a_training_run(yaml_file):
    run_settings = ["--output_dir", "runs/a", "--temperature", "0.5", "--seed", "7"]
    config = train_config(*run_settings, "--prompts", "p.txt")
    config = generate_config("--config", yaml_file(to_yaml(config)), "--seed", "8")
    assert (config.cot, config.cfg_weight, config.max_completion_length) == (True, 1.0, 24)
    assert (config.temperature, config.prompts, config.seed) == (0.5, "p.txt", 8)
    assert config.output_dir == GenerateConfig.output_dir
    assert generate_config("--config", "settings.yaml", "--output_dir", "out").output_dir == "out"


def test_generate_takes_the_output_folder_of_its_own_file(yaml_file):
    assert generate_config("--config", yaml_file("output_dir: out\n")).output_dir == "out"


@pytest.mark.parametrize("line", ["beta: 0.1\nlerning_rate: 3\n", "lerning_rate: 3\n"])
def test_a_name_that_neither_command_has_is_refused(yaml_file, line):
    with pytest.raises(UserError, match=r"^lerning_rate: there is no such setting"):
        generate_config("--config", yaml_file(line))


def test_a_training_setting_is_refused_as_a_flag_of_generate():
    with pytest.raises(UserError, match=r"^beta: there is no such setting"):
        generate_config("--beta", "0.1")


def test_training_refuses_the_settings_of_generate(yaml_file):
    with pytest.raises(UserError, match=r"^batch_size: there is no such setting"):
        train_config("--config", yaml_file("batch_size: 2\n"))


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
def test_a_typo_is_one_line_and_exit_code_2(here, module):
    finished = run(module, "--sead", "3", cwd=here)
    assert finished.code == 2
    assert finished.error_line == (
        f"{module}: error: sead: there is no such setting; did you mean seed?"
    )
    assert finished.out == ""
    assert not list(here.iterdir())


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
def test_a_typo_is_reported_before_torch_is_imported(here, module):
    (here / "torch.py").write_text("raise SystemExit('torch was imported')")
    finished = subprocess.run(
        [sys.executable, "-m", module, "--sead", "3"], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.splitlines() == [
        f"{module}: error: sead: there is no such setting; did you mean seed?"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cot"], "write --cot VALUE; booleans: --cot true"),
        (["--cot", "maybe"], "cot: maybe is not valid; give true or false"),
        (
            ["--reward_funcs", "image_nsc"],
            "image_nsc is not valid; give a list of str, such as [image_nsc]",
        ),
        (
            ["--lora_target_modules", "q_proj"],
            "q_proj is not valid; give a list of str, such as [q_proj]",
        ),
        (
            ["--resume_from_checkpoint", "runs/a/checkpoints/step_1"],
            "write --resume_from_checkpoint true, and the run's folder as --output_dir",
        ),
    ],
)
def test_the_syntax_of_other_trainers_is_answered_with_ours(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train_config(*arguments)


# --- The list of commands and the console scripts -------------------------------------------------


def test_python_m_iris_fast_lists_the_commands_without_torch(here):
    (here / "torch.py").write_text("raise SystemExit('torch was imported')")
    listed = subprocess.run(
        [sys.executable, "-m", "iris_fast"], capture_output=True, text=True, check=True
    )
    assert listed.stderr == ""
    for command in COMMANDS:
        assert f"python -m iris_fast.{command} " in listed.stdout


def test_console_scripts_start_the_commands(here):
    (here / "torch.py").write_text("raise SystemExit('torch was imported')")
    scripts = re.search(r'"iris-fast-\{command\} = (.+):\{command\}"\s+for command in (.+)', SETUP)
    assert (scripts[1], set(ast.literal_eval(scripts[2]))) == ("iris_fast.__main__", {*COMMANDS})
    program = "from iris_fast.__main__ import train; import sys; sys.exit(train())"
    finished = subprocess.run(
        [sys.executable, "-c", program, "--sead", "3"], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("iris_fast.train: error: sead: there is no such setting")


def test_the_help_names_every_built_in_reward():
    shown = " ".join(make_parser(TrainConfig, "t").format_help().split())
    assert all(name in shown for name in REWARDS)
