"""Encoders on the Hugging Face Hub: written as its library does, pushed, and loaded by either. No network is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, running_hub
from huggingface_hub import PyTorchModelHubMixin
from report_runs import write_run

from avppc import EncoderConfig, VideoEncoder, load_encoder
from avppc.cli import main
from avppc.config import ExportConfig
from avppc.export.export import export
from avppc.models.encoder_file import save_encoder
from avppc.train.run_folder import _lasting_source

CONFIG = EncoderConfig(width=4, features=16)
VIDEO = torch.rand(2, 5, 32, 32, generator=torch.Generator().manual_seed(0))


class HubEncoder(VideoEncoder, PyTorchModelHubMixin):
    """As huggingface_hub's documentation has it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "run"
    write_run(directory, Path("/secret/place/clips"))
    torch.manual_seed(1)
    save_encoder(VideoEncoder(CONFIG), directory / "encoder.safetensors")
    return directory


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    export(ExportConfig(run, tmp_path / "out", formats=("hub",)))
    return tmp_path / "out"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


@torch.inference_mode()
def features(encoder: torch.nn.Module) -> torch.Tensor:
    return encoder.eval()(VIDEO)


def upload(hub: Hub, folder: Path, **changes: bytes | None) -> None:
    """The files of a folder as the repository somebody/mouths, some of them others or not there."""
    names = {"config_json": "config.json", "model_safetensors": "model.safetensors"}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for key, content in changes.items():
        files[names[key]] = content or b""
        if content is None:
            del files[names[key]]
    hub.commit("somebody/mouths", files)


class TestLayout:
    def test_it_is_that_of_the_hubs_mixin(self, run: Path, exported: Path, tmp_path: Path) -> None:
        assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in exported.iterdir()}
        expected = features(load_encoder(run))
        assert torch.equal(features(HubEncoder.from_pretrained(exported)), expected)
        HubEncoder.from_pretrained(exported).save_pretrained(tmp_path / "theirs")
        assert json.loads((tmp_path / "theirs" / "config.json").read_bytes()) == json.loads(
            (exported / "config.json").read_bytes()
        )
        assert torch.equal(features(load_encoder(tmp_path / "theirs")), expected)
        assert torch.equal(features(load_encoder(exported)), expected)
        assert torch.equal(features(load_encoder(exported / "model.safetensors")), expected)

    def test_the_same_export_again_finds_it_done(
        self, run: Path, exported: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["export", str(run), "--out", str(exported), "--format", "hub"]
        assert main(flags) == 0
        assert "model.safetensors" in capsys.readouterr().out
        (exported / "config.json").write_text("{}")
        assert main(flags) == 2
        assert "out exists already" in capsys.readouterr().err

    def test_the_card_has_the_hubs_head(self, exported: Path) -> None:
        import yaml

        _, head, text = (exported / "README.md").read_text().split("---\n", 2)
        said = yaml.safe_load(head)
        assert (said["license"], said["library_name"]) == ("apache-2.0", "avppc")
        assert 'load_encoder("hf://USER/NAME")' in text
        assert "/secret" not in text


class TestRoundTrip:
    def test_pushed_and_loaded(self, run: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "exported"
        flags = ["export", str(run), "--out", str(out), "--format", "hub", "--push", "somebody/mouths", "--private"]
        assert main(flags) == 0
        said = capsys.readouterr().out
        assert f'pushed to {hub.address}/somebody/mouths: avppc.load_encoder("hf://somebody/mouths")' in said
        _, files = hub.files("somebody/mouths") or ("", {})
        assert hub.private == {"somebody/mouths": True}
        assert files.keys() == {".gitattributes", "config.json", "model.safetensors", "README.md", "encoder.json"}
        assert all(files[path.name] == path.read_bytes() for path in out.iterdir())
        encoder = load_encoder("hf://somebody/mouths")
        assert not encoder.training
        assert torch.equal(features(encoder), features(load_encoder(run)))
        assert torch.equal(features(HubEncoder.from_pretrained(out)), features(encoder))
        # A Path makes one stroke of two, as settings do.
        assert torch.equal(features(load_encoder(Path("hf://somebody/mouths"))), features(encoder))
        assert _lasting_source("hf://somebody/mouths") == "hf://somebody/mouths"

    def test_a_revision(self, exported: Path, hub: Hub, tmp_path: Path) -> None:
        upload(hub, exported)
        hub.tags["somebody/mouths"] = {"v1": hub.commits["somebody/mouths"][0][0]}
        torch.manual_seed(7)
        newer = HubEncoder(CONFIG)
        newer.save_pretrained(tmp_path / "newer")
        upload(hub, tmp_path / "newer")
        assert torch.equal(features(load_encoder("hf://somebody/mouths@v1")), features(load_encoder(exported)))
        assert torch.equal(features(load_encoder("hf://somebody/mouths")), features(newer))
        with pytest.raises(FileNotFoundError, match="hf://somebody/mouths has nothing at revision 'v2'"):
            load_encoder("hf://somebody/mouths@v2")

    def test_what_is_in_the_cache_needs_no_hub(self, exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        upload(hub, exported)
        load_encoder("hf://somebody/mouths")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        load_encoder("hf://somebody/mouths")


class TestErrors:
    def test_no_such_repository(self, hub: Hub) -> None:
        with pytest.raises(FileNotFoundError, match=r"no repository nobody/nothing at http.*, or it is not open"):
            load_encoder("hf://nobody/nothing")
        for name in ("mouths", "a/b/c", "", "a b/c"):
            with pytest.raises(ValueError, match="path must be USER/NAME, a repository on the Hugging Face Hub, got"):
                load_encoder(f"hf://{name}")

    def test_missing_files(self, exported: Path, hub: Hub) -> None:
        upload(hub, exported, model_safetensors=None)
        with pytest.raises(
            FileNotFoundError, match=r"hf://somebody/mouths has no model.safetensors: .*pickled weights"
        ):
            load_encoder("hf://somebody/mouths")
        (exported / "config.json").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"model.safetensors needs its configuration beside it, .*config.json"
        ):
            load_encoder(exported)

    def test_damaged_files(self, exported: Path, hub: Hub) -> None:
        content = bytearray((exported / "model.safetensors").read_bytes())
        upload(hub, exported, model_safetensors=bytes(content[:-9]))
        with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
            load_encoder("hf://somebody/mouths")
        content[-3] ^= 1
        (exported / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged: the checksum of its weights"):
            load_encoder(exported)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            (
                {"width": 8},
                r"config.json is not the configuration that the header of model.safetensors has: .*'width': 4",
            ),
            ({"backbone": "vgg"}, r"config.json: backbone must be one of .* got 'vgg'"),
            ({"hidden_size": 3}, r"config.json: unknown fields \['hidden_size'\]"),
        ],
    )
    def test_a_wrong_configuration(self, changes: dict[str, object], text: str, exported: Path, hub: Hub) -> None:
        config = {**json.loads((exported / "config.json").read_bytes()), **changes}
        upload(hub, exported, config_json=json.dumps(config).encode())
        with pytest.raises(ValueError, match=text):
            load_encoder("hf://somebody/mouths")

    def test_weights_of_others_must_fit(self, tmp_path: Path) -> None:
        HubEncoder(CONFIG).save_pretrained(tmp_path)
        config = {**json.loads((tmp_path / "config.json").read_bytes()), "features": 24}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match=r"the weights do not fit its configuration: project.0.weight must be .*\[24, 64\]"
        ):
            load_encoder(tmp_path)

    def test_the_hub_is_away(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for half a minute
        with pytest.raises(OSError, match=r"mouths: http.* cannot be reached, and config.json is not in the cache"):
            load_encoder("hf://somebody/mouths")

    def test_a_push_without_the_right_token(
        self, run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        flags = ["export", str(run), "--out", str(tmp_path / "out"), "--format", "hub", "--push", "somebody/mouths"]
        assert main(flags) == 2
        assert "401" in capsys.readouterr().err
        assert load_encoder(tmp_path / "out").config == CONFIG  # the export is there, and the same command goes on
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert main(flags) == 0

    def test_without_the_package(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match=r"needs the package huggingface_hub .*pip install 'avppc\[hub\]'"):
            load_encoder("hf://somebody/mouths")
        flags = ["export", str(run), "--out", str(tmp_path / "out"), "--format", "hub", "--push", "somebody/mouths"]
        assert main(flags) == 2
        assert "avppc[hub]" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert main(flags[:-2]) == 0  # to write the files it is not needed

    def test_settings_that_do_not_go_together(self, tmp_path: Path) -> None:
        for changes, text in (
            ({"push": "mouths", "formats": ("hub",)}, "push must be USER/NAME"),
            ({"push": "somebody/mouths"}, "push needs the format 'hub', got formats="),
            ({"private": True}, "private is about the repository of push"),
        ):
            with pytest.raises(ValueError, match=text):
                ExportConfig(tmp_path, tmp_path / "out", **changes)  # type: ignore[arg-type]
