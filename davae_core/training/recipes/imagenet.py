"""The paper's ImageNet tokenizer: f32, 32 + 96 channels, on VA-VAE.

    python -m davae_core.training autoencoder imagenet_f32c128 --base vavae.safetensors --data.images imagenet/train

Source: arXiv 2603.22125 and the configuration and code of the authors' release (github.com/caixin98/DA-VAE,
``lightningdit/davae``). Where this differs from them, a comment says so.
"""

from pathlib import Path

from ..data.config import DataConfig
from ..objective import ReconstructionConfig
from ..run.config import OptimiserConfig, RunConfig
from ..tasks.autoencoder import AlignmentConfig, AutoencoderRecipe
from ..tasks.critic import CriticConfig

SIZE, SCALE = 512, 2  # VA-VAE encodes the 256 px image, as it was trained to
BASE_CHANNELS, DETAIL_CHANNELS = 32, 96  # r = 3
FACTOR = 16 * SCALE

# The authors' KL loss is 1e-6 times the mean over the latent's numbers of mean^2 + variance - 1 - log-variance; here
# the divergence is half of that, summed over the latent of an image.
KL = 2 * 1e-6 / (DETAIL_CHANNELS * (SIZE // FACTOR) ** 2)

IMAGENET_F32C128 = AutoencoderRecipe(
    # The release leaves its ImageNet loader out. Centre crops, half of them mirrored.
    data=DataConfig(("data/imagenet/train",), size=SIZE, workers=8),
    # 50 epochs of 1.28 million images in batches of 64. The authors: 8 GPUs with 8 images each; the batch here is that
    # of all processes together. bf16 as theirs ("auto" chooses it on GPUs).
    run=RunConfig(Path("output/imagenet_f32c128"), steps=1_000_000, batch=64),
    base=Path("models/vae/vavae.safetensors"),
    family="vavae",
    # Adam with the authors' rate and moments, constant, without decay or averaging. Two things are not theirs: the
    # gradient is clipped and the rate rises over 100 steps, so that a bad batch at the start ends no run.
    optimiser=OptimiserConfig(lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0, clip=1.0, warmup=100, ema=0.0),
    # L1 + LPIPS (VGG), as theirs. LPIPS has to find its files: see `--losses.network` for one that works offline.
    losses=ReconstructionConfig(l1=1.0, perceptual=1.0, network="lpips-vgg", kl=KL),
    # The weight times the ratio of gradients on the last layer of the detail encoder. The authors align a sample of the
    # detail latent to VA-VAE's raw latent, and leave the adversarial loss out of the ratio. Here it is the mean, to the
    # base latent in the units of its measured statistics, as the decoder sees it; the ratio is of all other losses.
    alignment=AlignmentConfig(weight=0.5, adaptive=True),
    # Hinge loss, its weight times the ratio of gradients on the decoder's last layer, of a PatchGAN critic of three
    # layers; the first 5001 steps are without. Group norm in the critic where theirs has batch norm, so that a
    # reconstruction has the same scores in any batch. Both ratios are those of a micro-batch, over all processes: with
    # run.micro_batch the training is another one.
    critic=CriticConfig(weight=0.1, adaptive=True, start=5001, width=64, layers=3),
    detail_channels=DETAIL_CHANNELS,
    scale=SCALE,
    train_trunk=True,
    # The whole detail latent of a sample. The authors enlarge what is kept by 1 / 0.9 in training; here it stays as it
    # is, so that the decoder sees in training what it sees later.
    detail_dropout=0.1,
    file="imagenet_f32c128_davae.safetensors",
)

AUTOENCODER = {"imagenet_f32c128": ("ImageNet 512 px: 32 + 96 channels at 1/32 on VA-VAE", IMAGENET_F32C128)}
