"""What diffusers wrote is read here, and what is written here diffusers reads, with the same numbers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from davae_core.adapter import Adapter, Recommended, merge, zero_adapter
from davae_core.autoencoder import Autoencoder, AutoencoderConfig
from davae_core.checkpoints import (
    MergedModel,
    files,
    load_merged,
    names,
    native,
    save_adapter,
    save_autoencoder,
    save_merged,
)
from davae_core.davae import DAVAE, PREDICTOR
from davae_core.errors import CheckpointError
from davae_core.history import History, identity
from davae_core.latent import LatentSpec
from davae_core.lora import LORA_MODULES
from davae_core.mmdit import MMDiT, MMDiTConfig
from davae_core.predictor import DetailPredictor, PredictorConfig

SPEC = LatentSpec(detail_mean=tuple(0.1 * i for i in range(16)), detail_std=tuple(1 + 0.1 * i for i in range(16)))
TOY = MMDiTConfig(hidden=128, depth=3, grid=8, context=48, pooled=40, dual_attention=(0,))


def mmdit_of(path: Path) -> MMDiT:
    state, _ = files.read(path)
    model = MMDiT(MMDiTConfig.from_state_dict(state))
    model.load_state_dict(state)
    return model.eval()


def vae_of(path: Path) -> Autoencoder:
    state, _ = files.read(path)
    model = Autoencoder(AutoencoderConfig.from_state_dict(state))
    model.load_state_dict(state)
    return model.eval()


def make_adapter(rank: int = 3) -> Adapter:
    adapter = zero_adapter(TOY, SPEC, rank=rank, targets=tuple(LORA_MODULES))
    for name, tensor in adapter.state.items():
        if name.endswith(".alpha"):
            tensor.fill_(2.0 if "attn.to_q" in name else rank)
        else:
            torch.nn.init.normal_(tensor, std=0.05)
    return replace(adapter, config=replace(adapter.config, recommended=Recommended(1024, 3.0, 2.5, 30)))


@pytest.fixture
def base(make_mmdit: Callable[..., MMDiT]) -> MMDiT:
    return make_mmdit(depth=3, grid=8)


def test_a_pipeline_folder_predicts_and_draws_the_same_here(
    pipeline: Path, tmp_path: Path, run, kl: AutoencoderKL, transformer: SD3Transformer2DModel, inputs, theirs
) -> None:
    assert len(list((pipeline / "transformer").glob("*.safetensors"))) > 1
    written = run(pipeline, tmp_path / "out")
    assert [path.name for path in written] == ["diffusion_model.safetensors", "vae.safetensors"]
    given = inputs(16)
    assert torch.allclose(mmdit_of(written[0])(*given), theirs(transformer, *given), atol=1e-4)
    vae, x = vae_of(written[1]), torch.rand(1, 3, 32, 48) * 2 - 1
    z = kl.encode(x).latent_dist.mode()
    assert torch.allclose(vae.encode(x), z, atol=1e-4)
    assert torch.allclose(vae.decode(z), kl.decode(z).sample, atol=1e-4)


def test_a_vae_with_quant_convs_is_read_and_written(sd1_kl: AutoencoderKL, tmp_path: Path, run) -> None:
    sd1_kl.save_pretrained(tmp_path / "vae")
    (written,) = run(tmp_path / "vae", tmp_path / "vae.safetensors")
    vae, x = vae_of(written), torch.rand(1, 3, 32, 48) * 2 - 1
    z = sd1_kl.encode(x).latent_dist.mode()
    assert torch.allclose(vae.encode(x), z, atol=1e-4)
    assert torch.allclose(vae.decode(z), sd1_kl.decode(z).sample, atol=1e-4)
    run(written, tmp_path / "back", "--to", "diffusers")
    (folder,) = {path.parent for path in (tmp_path / "back").rglob("config.json")}
    again = AutoencoderKL.from_pretrained(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in sd1_kl.state_dict().items())


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("inner", [False, True])
def test_one_component_may_be_named_by_its_folder_or_as_a_part(
    pipeline: Path, tmp_path: Path, run, component: str, inner: bool
) -> None:
    part = {"transformer": "diffusion_model", "vae": "vae"}[component]
    target = tmp_path / "one.safetensors"
    written = run(pipeline / component, target) if inner else run(pipeline, target, "--part", part)
    assert written == [target]
    assert len(files.read_metadata(target)[0]) > 50


def test_a_model_without_query_norms_or_second_attention_is_told_from_its_shapes(
    tmp_path: Path, run, inputs, theirs
) -> None:
    sd3 = SD3Transformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=128,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
    ).eval()
    sd3.save_pretrained(tmp_path / "sd3")
    (written,) = run(tmp_path / "sd3", tmp_path / "sd3.safetensors")
    given = inputs(16)
    assert torch.allclose(mmdit_of(written)(*given), theirs(sd3, *given), atol=1e-4)


def test_numbers_keep_their_dtype_and_their_bits(tmp_path: Path, run, transformer: SD3Transformer2DModel) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in transformer.state_dict().items()}
    (tmp_path / "half").mkdir()
    files.save(tmp_path / "half" / "diffusion_pytorch_model.safetensors", weights, {})
    (written,) = run(tmp_path / "half", tmp_path / "half.safetensors")
    state, _ = files.read(written)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    q = weights["transformer_blocks.1.attn.to_q.weight"]
    assert torch.equal(state["joint_blocks.1.x_block.attn.qkv.weight"][:128], q)


def test_a_mistake_in_the_names_is_found_before_anything_is_written(
    pipeline: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = names.Rule.to_native

    def careless(rule: names.Rule, tensors):  # type: ignore[no-untyped-def]
        return honest(replace(rule, swapped=False), tensors)

    monkeypatch.setattr(names.Rule, "to_native", careless)
    with pytest.raises(CheckpointError, match="differs by"):
        run(pipeline / "transformer", tmp_path / "new" / "x.safetensors")
    assert not (tmp_path / "new").exists()


# Written for diffusers


def test_a_base_model_and_a_vae_load_in_diffusers(
    tmp_path: Path, run, base: MMDiT, toy_vae: AutoencoderConfig, inputs, theirs
) -> None:
    vae = Autoencoder(toy_vae).eval()
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in base.state_dict().items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in vae.state_dict().items()}
    files.save(tmp_path / "sd35.safetensors", whole, {})
    run(tmp_path / "sd35.safetensors", tmp_path / "d", "--to", "diffusers")
    given = inputs(16)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "d" / "transformer")
    assert torch.allclose(theirs(loaded, *given), base(*given), atol=1e-4)
    kl, z = AutoencoderKL.from_pretrained(tmp_path / "d" / "vae"), torch.randn(1, 16, 3, 2)
    assert torch.allclose(kl.decode(z).sample, vae.decode(z), atol=1e-4)
    assert (kl.config.shift_factor, kl.config.scaling_factor) == (0.0609, 1.5305)


def test_a_merged_model_goes_to_diffusers_and_back(tmp_path: Path, run, base: MMDiT, inputs, theirs) -> None:
    adapter = make_adapter()
    state = merge(base.state_dict(), adapter)
    save_merged(tmp_path / "m.safetensors", MergedModel(state, SPEC, adapter.config.recommended))
    run(tmp_path / "m.safetensors", tmp_path / "d", "--to", "diffusers")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "d" / "transformer")
    assert (loaded.config.in_channels, loaded.config.out_channels) == (32, 32)
    given, ours = inputs(32), mmdit_of(tmp_path / "m.safetensors")
    assert torch.allclose(theirs(loaded, *given), ours(*given), atol=1e-4)
    (back,) = run(tmp_path / "d", tmp_path / "back.safetensors")
    again = load_merged(back)
    assert (again.latent, again.recommended) == (SPEC, adapter.config.recommended)
    assert all(torch.equal(again.state[name], tensor) for name, tensor in state.items())


def test_an_adapters_lora_loads_in_diffusers_and_does_the_same_there(
    tmp_path: Path, run, base: MMDiT, inputs, theirs
) -> None:
    adapter = make_adapter()
    save_adapter(tmp_path / "a.safetensors", adapter)
    run(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers")
    files.save(tmp_path / "b.safetensors", base.state_dict(), {})
    run(tmp_path / "b.safetensors", tmp_path / "b", "--to", "diffusers")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "b" / "transformer")
    given = inputs(16)
    plain = theirs(loaded, *given)
    loaded.load_lora_adapter(tmp_path / "d" / "pytorch_lora_weights.safetensors", prefix="transformer")
    only_lora = merge(base.state_dict(), adapter)
    ours = MMDiT(TOY)
    ours.load_state_dict({**only_lora, **{name: base.state_dict()[name] for name in native_layers()}})
    changed = theirs(loaded, *given)
    assert torch.allclose(changed, ours.eval()(*given), atol=1e-4)
    assert (changed - plain).abs().max() > 1e-2
    rest, _ = files.read(tmp_path / "d" / "davae_embedder_head.safetensors")
    assert all(torch.equal(rest[name], adapter.state[name]) for name in adapter.state if name.startswith("davae."))
    told = json.loads((tmp_path / "d" / "davae.json").read_text())
    assert told["latent"]["detail_std"] == list(SPEC.detail_std) and told["recommended"]["steps"] == 30


def native_layers() -> tuple[str, ...]:
    return ("x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight", "final_layer.linear.bias")


@pytest.mark.parametrize(("shared", "inside"), [(True, False), (False, False), (True, True)])
def test_an_autoencoder_runs_by_diffusers_encoder_and_decoder(
    tmp_path: Path, run, make_davae: Callable[..., DAVAE], shared: bool, inside: bool
) -> None:
    model = make_davae(shared_trunk=shared, base_decoder=True)
    if inside:
        predictor = DetailPredictor(PredictorConfig(model.latent, width=64, blocks=1))
        torch.nn.init.normal_(predictor.conv_out.weight, std=0.1)
        model.set_predictor(predictor)
    save_autoencoder(tmp_path / "a.safetensors", model)
    run(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers")
    detail = AutoencoderKL.from_pretrained(tmp_path / "d" / "detail_vae")
    small = AutoencoderKL.from_pretrained(tmp_path / "d" / "base_vae")
    blocks, _ = files.read(tmp_path / "d" / "davae_blocks.safetensors")
    x = torch.rand(1, 3, 32, 64) * 2 - 1
    latent = small.encode(model.shrink(x)).latent_dist.mode()
    z = model.encode(x)
    assert torch.allclose(latent, z[:, :16], atol=1e-4)
    assert torch.allclose(small.decode(latent).sample, model.decode_base(latent), atol=1e-4)
    base, z_detail = (z[:, :16] - 0.0609) * 1.5305, z[:, 16:]
    if inside:
        own = {name.removeprefix(PREDICTOR): t for name, t in blocks.items() if name.startswith(PREDICTOR)}
        expecting = DetailPredictor(PredictorConfig.from_state_dict(own))
        expecting.load_state_dict(own)
        z_detail = z_detail + expecting(base)
    y = torch.cat([base, z_detail], dim=1)
    h = torch.nn.functional.conv2d(y, blocks["dc_up.conv.weight"], blocks["dc_up.conv.bias"], padding=1)
    h = torch.nn.functional.pixel_shuffle(h + y.repeat_interleave(h.shape[1] // 32, dim=1), 2)
    h = detail.decoder.mid_block(h)
    for block in detail.decoder.up_blocks:
        h = block(h)
    image = detail.decoder.conv_out(detail.decoder.conv_act(detail.decoder.conv_norm_out(h)))
    assert torch.allclose(image, model.decode(z), atol=1e-4)


def test_an_autoencoder_without_a_base_decoder_asks_for_the_base_vae(
    tmp_path: Path, run, make_davae: Callable[..., DAVAE], toy_vae: AutoencoderConfig
) -> None:
    model, vae = make_davae(), Autoencoder(toy_vae)
    vae.encoder.load_state_dict(model.base_encoder.state_dict())
    save_autoencoder(tmp_path / "a.safetensors", model)
    with pytest.raises(CheckpointError, match="--base"):
        run(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers")
    assert not (tmp_path / "d").exists()
    files.save(tmp_path / "vae.safetensors", vae.state_dict(), {})
    run(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers", "--base", tmp_path / "vae.safetensors")
    kl, z = AutoencoderKL.from_pretrained(tmp_path / "d" / "base_vae"), torch.randn(1, 16, 2, 2)
    assert torch.allclose(kl.decode(z).sample, vae.decode(z), atol=1e-4)


def test_the_base_vae_has_to_be_the_one_of_the_autoencoder(
    tmp_path: Path, run, make_davae: Callable[..., DAVAE], toy_vae: AutoencoderConfig, base: MMDiT
) -> None:
    model, right, wrong = make_davae(), Autoencoder(toy_vae), Autoencoder(toy_vae)
    right.encoder.load_state_dict(model.base_encoder.state_dict())
    history = History(of={"base_vae": identity("base_vae", right.state_dict(), "mine.safetensors")})
    save_autoencoder(tmp_path / "a.safetensors", model, history=history)
    files.save(tmp_path / "wrong.safetensors", wrong.state_dict(), {"davae.base": "flux1"})
    files.save(tmp_path / "model.safetensors", base.state_dict(), {})
    said = r"VAE of FLUX\.1 \(told by its metadata\).*70 of 70 tensors.*give mine\.safetensors"
    for name, message in (("wrong", said), ("model", "and holds no VAE; give the plain VAE that a.safetensors")):
        with pytest.raises(CheckpointError, match=message):
            run(
                tmp_path / "a.safetensors",
                tmp_path / "d",
                "--to",
                "diffusers",
                "--base",
                tmp_path / f"{name}.safetensors",
            )
        assert not (tmp_path / "d").exists()
    for dtype in (torch.float16, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        files.save(path, right.to(dtype).state_dict(), {})
        run(tmp_path / "a.safetensors", tmp_path / str(dtype), "--to", "diffusers", "--base", path)


@pytest.mark.parametrize("decoder", ["inside", "beside"])
def test_an_autoencoder_on_a_vae_with_quant_convs_keeps_them(
    tmp_path: Path, run, make_davae: Callable[..., DAVAE], decoder: str
) -> None:
    shape = AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1, latent_channels=4, quant_conv=True)
    vae = Autoencoder(shape)
    model = make_davae(4, base=shape, base_decoder=decoder == "inside", base_shift=0.0, base_scale=0.13025)
    given = {name.replace("base_", ""): tensor for name, tensor in model.state_dict().items() if "base_" in name}
    vae.load_state_dict(vae.state_dict() | given)
    save_autoencoder(tmp_path / "a.safetensors", model)
    files.save(tmp_path / "vae.safetensors", vae.state_dict(), {})
    options = () if decoder == "inside" else ("--base", tmp_path / "vae.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers", *options)
    for name in ("base_vae", "detail_vae"):
        config = AutoencoderKL.from_pretrained(tmp_path / "d" / name).config
        assert (config.use_quant_conv, config.use_post_quant_conv, config.scaling_factor) == (True, True, 0.13025)
    (back,) = run(tmp_path / "d" / "base_vae", tmp_path / "back.safetensors")
    state, told = files.read(back)
    assert told["davae.base"] == "sdxl" and state.keys() == vae.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())


def test_a_vae_that_lacks_a_tensor_is_not_written(tmp_path: Path, run, toy_vae: AutoencoderConfig) -> None:
    state = Autoencoder(toy_vae).state_dict()
    del state["decoder.conv_out.bias"]
    files.save(tmp_path / "v.safetensors", state, {})
    with pytest.raises(CheckpointError, match=r"1 tensors of its layout are not there, decoder\.conv_out\.bias"):
        run(tmp_path / "v.safetensors", tmp_path / "d", "--to", "diffusers")


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path, run, make_davae: Callable[..., DAVAE]) -> None:
    save_autoencoder(tmp_path / "a.safetensors", make_davae(base_decoder=True))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        run(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["mine.txt"]
    assert native.load_autoencoder(tmp_path / "a.safetensors").config.base_decoder
