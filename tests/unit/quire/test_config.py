"""Settings: where a value comes from, how it is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.config import (
    ENV_ALIASES,
    FILE_ALIASES,
    FLAG_ALIASES,
    EngineConfig,
    resolve,
    settings,
    split_flags,
    to_environ,
)
from quire.errors import ConfigError


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "quire.toml"
    path.write_text(text)
    return str(path)


def test_flag_wins_over_variable_over_file_over_default(tmp_path: Path) -> None:
    file = config_file(tmp_path, "[server]\nport = 1\nhost = 'a'\nmax_prompts = 9\n")
    found = resolve({"port": "3"}, {"QUIRE_PORT": "2", "QUIRE_HOST": "b"}, file)
    assert (found.config.port, found.config.host, found.config.max_prompts) == (3, "b", 9)
    assert found.config.block_size == 16
    assert found.sources["port"] == "flag --port"
    assert found.sources["host"] == "env QUIRE_HOST"
    assert found.sources["max_prompts"].startswith("file ")
    assert found.is_default("block_size") and not found.is_default("port")


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = config_file(tmp_path, "[cache]\nblock_size = 32\n")
    assert resolve({}, {"QUIRE_CONFIG": file}).config.block_size == 32


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512MB", 512 * 10**6), ("2g", 2 * 10**9), ("1.5KiB", 1536), ("77", 77)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert resolve({"kv_cache_memory_bytes": text}, {}).config.kv_cache_memory_bytes == size


@pytest.mark.parametrize(
    ("text", "count"),
    [("32k", 32000), ("32K", 32768), ("4096", 4096), ("auto", 0), ("1_000", 1000)],
)
def test_counts_have_units(text: str, count: int) -> None:
    assert resolve({"max_model_len": text}, {}).config.max_model_len == count


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("port", "x", "not a int"),
        ("port", "70000", "between 0 and 65535"),
        ("port", "-1", "between 0 and 65535"),
        ("max_model_len", "lots", "expected an integer"),
        ("kv_cache_memory_bytes", "4 apples", "expected a size"),
        ("enable_prefix_caching", "maybe", "expected true or false"),
        ("gpu_memory_utilization", "nan", "between 0.05 and 1"),
        ("gpu_memory_utilization", "inf", "between 0.05 and 1"),
        ("dtype", "int3", "not one of auto, float32"),
        ("block_size", "9" * 40, "between 1 and 1024"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        resolve({name: text}, {})
    assert "--" + name.replace("_", "-") in str(caught.value)
    assert caught.value.kind.exit_status == 2


def test_unknown_flag_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--max-model-length.*Did you mean --max-model-len"):
        split_flags(["--max-model-length", "5"])


def test_unknown_variable_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="QUIRE_PROT.*QUIRE_PORT"):
        resolve({}, {"QUIRE_PROT": "1"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[server]\nprot = 1", "unknown key 'prot'.*port"),
        ("[servr]\nx = 1", "unknown section.*server"),
        ("[model]\nport = 1", r"belongs in section \[server\]"),
        ("port = 1", "must stand in a section"),
        ("[server", "not valid TOML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve({}, {}, config_file(tmp_path, text))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="/nope.toml"):
        resolve({}, {}, "/nope.toml")


def test_switches_and_lists() -> None:
    flags, rest = split_flags(
        ["--no-enable-prefix-caching", "demo", "--api-key", "a", "--api-key=b,c", "-tp", "1"]
    )
    config = resolve(flags, {}).config
    assert rest == ["demo"]
    assert config.enable_prefix_caching is False
    assert config.api_key == ("a", "b", "c")


def test_other_spellings_reach_the_same_field() -> None:
    words = ["--model-path", "m", "--tp-size", "1", "--mem-fraction-static", "0.8"]
    config = resolve(split_flags([*words, "--disable-radix-cache"])[0], {}).config
    assert (config.model, config.gpu_memory_utilization) == ("m", 0.8)
    assert config.enable_prefix_caching is False


def test_all_nine_variables_of_the_older_kind_are_read() -> None:
    environ = {
        "LLM_ENGINE_HOST": "0.0.0.0",
        "LLM_ENGINE_PORT": "9",
        "LLM_ENGINE_API_KEY": "k",
        "LLM_ENGINE_MODEL_PATH": "m",
        "LLM_ENGINE_DEVICE": "cpu",
        "LLM_ENGINE_MAX_SEQUENCE_LENGTH": "128",
        "LLM_ENGINE_CACHE_ENABLED": "false",
        "LLM_ENGINE_CACHE_SIZE_MB": "64",
        "LLM_ENGINE_LOG_LEVEL": "debug",
    }
    assert set(environ) == set(ENV_ALIASES)
    config = resolve({}, environ).config
    assert (config.host, config.port, config.api_key, config.model) == ("0.0.0.0", 9, ("k",), "m")
    assert (config.device, config.max_model_len, config.log_level) == ("cpu", 128, "debug")
    assert (config.enable_prefix_caching, config.kv_cache_memory_bytes) == (False, 64 << 20)


def test_our_variable_wins_over_the_older_one() -> None:
    assert resolve({}, {"LLM_ENGINE_PORT": "9", "QUIRE_PORT": "10"}).config.port == 10


def test_every_alias_names_a_field() -> None:
    names = {f.name for f in settings()}
    targets = [*FLAG_ALIASES.values(), *(a.name for a in ENV_ALIASES.values())]
    assert names >= {*targets, *(a.name for a in FILE_ALIASES.values())}
    assert not names & set(FLAG_ALIASES)


def test_every_default_is_within_its_own_bounds() -> None:
    EngineConfig().check()


def test_secrets_are_not_printed() -> None:
    table = resolve({"api_key": "hush", "kv_name_key": "hush"}, {}).table()
    assert "hush" not in table and "***" in table


def test_a_config_travels_through_the_environment() -> None:
    config = EngineConfig(
        port=5, api_key=("a", "b"), enable_prefix_caching=False, gpu_memory_utilization=0.35,
        kv_cache_memory_bytes=3 << 30, host="::1",
    )  # fmt: skip
    assert resolve({}, to_environ(config)).config == config
    assert to_environ(EngineConfig()) == {}
