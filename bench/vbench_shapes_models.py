"""Small networks of VBench's dimensions, trained on the shapes world and saved in the published layouts.

Each function trains one network of the real class from scratch, in two to five minutes of one core, and writes the file
that an evaluator would find under its published name. What is trained: RAFT on true flow, AMT on the frame between two,
MUSIQ on amounts of noise and blur, ViCLIP on clips and captions, UMT on kinds and directions of motion, DINO's vision
transformer on kinds and colours; aesthetic's head is a ridge on the features of the shapes world's own CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.backbones.amt import AmtConfig, build_amt
from mmalign.backbones.dino import IMAGENET, VitSizes, build_vit, resize_short, vit_tokens
from mmalign.backbones.musiq import MusiqConfig, build_musiq
from mmalign.backbones.raft import RaftSizes, build_raft
from mmalign.backbones.umt import UmtModel, UmtSizes
from mmalign.backbones.viclip import ViClip, ViClipModel, ViClipSizes
from mmalign.evaluation import Middle
from mmalign.progress import Progress
from mmalign.shapes.captions import COLOURS, KINDS
from mmalign.shapes.clip import FPS, MovingScene, render_clip
from mmalign.shapes.clip_data import DrawnClip, drawn_clips
from mmalign.shapes.damage import spoil
from mmalign.shapes.motion import DIRECTIONS
from mmalign.shapes.scene import SIDE, signed_distance
from mmalign.vbench.actions import shown

__all__ = ["ACTIONS", "FRAME", "TRAINED", "action_of"]

FRAME = 128
"""Pixels on a side of the clips that are scored: RAFT needs 121."""
ACTIONS = tuple(f"{kind} {way}" for kind in KINDS for way in (*(f"moving {each}" for each in DIRECTIONS), "standing"))
"""What the action classifier tells apart."""


def action_of(clip: DrawnClip) -> str:
    """The action that a clip of one shape shows."""
    (mover,) = clip.caption.movers
    return f"{mover.item.kind} {'standing' if mover.direction is None else f'moving {mover.direction}'}"


def _train(name: str, model: nn.Module, steps: int, rate: float, loss_of: Callable[[int], Tensor]) -> float:
    """Adam with a one-cycle rate; the mean loss of the last tenth."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    last = []
    with Progress(f"training {name}", steps) as bar:
        for step in range(steps):
            loss = loss_of(step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            last = [*last, loss.item()][-max(1, steps // 10) :]
            bar.update(step + 1)
    model.eval()
    return float(np.mean(last))


def _clips(count: int, seed: int, side: int, **options: object) -> list[tuple[DrawnClip, Tensor]]:
    """Clips with their pixels, uint8 [T, 3, side, side]."""
    items = drawn_clips(count, seed, side=side, **options)  # type: ignore[arg-type]
    return [(item, torch.from_numpy(item.clip()).permute(0, 3, 1, 2).contiguous()) for item in items]


# ------------------------------------------------------------------------------------------------ RAFT


def true_flow(scene: MovingScene, frame: int, side: int = FRAME) -> np.ndarray:
    """Flow in pixels from a frame to the next, float32 [2, side, side]: a shape's step where it is, else 0."""
    scale, flow = side / SIDE, np.zeros((2, side, side), np.float32)
    grid = (np.arange(side) + 0.5) / scale
    now, then = scene.at(frame / FPS), scene.at((frame + 1) / FPS)
    for here, there in zip(now.shapes, then.shapes, strict=True):
        inside = signed_distance(here.kind, grid[None, :] - here.x, grid[:, None] - here.y, here.radius) < 0
        flow[0][inside], flow[1][inside] = (there.x - here.x) * scale, (there.y - here.y) * scale
    return flow


def train_raft(folder: Path, seed: int, steps: int = 400) -> float:
    sizes = RaftSizes(
        features=(16, 16, 24, 32, 48), context=(16, 16, 24, 32, 64), radius=3, corr=(48, 32), flow=(24, 16), motion=32,
        hidden=32, head=48, mask=48,
    )  # fmt: skip
    torch.manual_seed(seed)
    model, rng = build_raft(sizes), np.random.default_rng(seed)
    items = drawn_clips(300, seed + 1, side=FRAME)
    pairs = []
    for item in items:
        clip = torch.from_numpy(render_clip(item.scene, side=FRAME)).permute(0, 3, 1, 2)
        pairs += [(clip[k], clip[k + 1], torch.from_numpy(true_flow(item.scene, k))) for k in (0, 4)]

    def loss_of(step: int) -> Tensor:
        chosen = [pairs[i] for i in rng.choice(len(pairs), 4, replace=False)]
        first, second, flow = (torch.stack([pair[part] for pair in chosen]) for part in range(3))
        flows = model(first / 127.5 - 1, second / 127.5 - 1, num_flow_updates=6)
        weight = 1 + 4 * (flow.abs().amax(1, keepdim=True) > 0)  # most of a frame stands still
        return sum(0.8 ** (5 - i) * (weight * (each - flow).abs()).mean() for i, each in enumerate(flows))  # type: ignore[return-value]

    loss = _train("RAFT", model, steps, 4e-4, loss_of)
    torch.save(model.state_dict(), folder / "raft-things.pth")
    return loss


# ------------------------------------------------------------------------------------------------ AMT, MUSIQ


def train_amt(folder: Path, seed: int, steps: int = 300) -> float:
    torch.manual_seed(seed)
    model = build_amt(
        AmtConfig((12, 16, 20, 24), skip=8, flows=2, trunk=(16, 24, 32), features=32, hidden=32, flow=12,
                  correlation=32, fused=32)
    )  # fmt: skip
    clips = [clip for _, clip in _clips(200, seed + 1, FRAME)]
    rng = np.random.default_rng(seed)

    def loss_of(step: int) -> Tensor:
        starts = [(clips[i], rng.integers(0, 7)) for i in rng.choice(len(clips), 4, replace=False)]
        first, middle, last = (torch.stack([clip[k + gap] for clip, k in starts]) / 255 for gap in range(3))
        error = model(first, last) - middle
        return (error**2 + 1e-6).sqrt().mean()

    loss = _train("AMT", model, steps, 1e-3, loss_of)
    torch.save({"state_dict": model.state_dict()}, folder / "amt-s.pth")
    return loss


def train_musiq(folder: Path, seed: int, steps: int = 200) -> float:
    """Targets are 100 for a clean picture, less 50 for the full amounts of noise and of blur."""
    torch.manual_seed(seed)
    model, rng = build_musiq(MusiqConfig(32, 32, 48, 96, 2)), np.random.default_rng(seed)
    with torch.no_grad():  # begins at the targets' mean and spread, which such steps would not reach
        model.head.weight.mul_(25)
        model.head.bias.fill_(75)
    frames = [clip[4:5] for _, clip in _clips(400, seed + 1, FRAME)]

    def loss_of(step: int) -> Tensor:
        pictures, targets = [], []
        for i in rng.choice(len(frames), 8, replace=False):
            picture, target = frames[i].permute(0, 2, 3, 1).numpy(), 100.0
            for kind in ("noise", "blur"):
                amount = float(rng.random()) * bool(rng.integers(2))
                picture, target = spoil(picture, kind, amount, rng), target - 50 * amount
            pictures.append(torch.from_numpy(picture[0]).permute(2, 0, 1) / 255)
            targets.append(target)
        return F.smooth_l1_loss(model(torch.stack(pictures)) / 25, torch.tensor(targets) / 25)

    loss = _train("MUSIQ", model, steps, 2e-3, loss_of)
    torch.save(model.state_dict(), folder / "musiq_spaq_ckpt-358bb6af.pth")
    return loss


# ------------------------------------------------------------------------------------------------ ViCLIP, UMT, DINO


def train_viclip(folder: Path, seed: int, steps: int = 400) -> float:
    torch.manual_seed(seed)
    sizes = ViClipSizes(32, 8, 8, 128, 3, 64, 2, 32, embed_dim=64)
    model, rng = ViClipModel(sizes), np.random.default_rng(seed)
    with torch.no_grad():
        for value in model.parameters():
            if not value.isfinite().all():
                value.zero_()
        model.temp.fill_(0.07)
    scorer = ViClip(model, torch.device("cpu"), torch.float32)
    items = _clips(1500, seed + 1, FRAME // 2)
    pixels = torch.stack([scorer._pixels(clip[None])[0] for _, clip in items])
    tokens = scorer.tokenizer([str(item.caption) for item, _ in items])
    model.requires_grad_(True)

    def loss_of(step: int) -> Tensor:
        chosen = rng.choice(len(items), 48, replace=False)
        clips = F.normalize(model.vision_encoder(pixels[chosen]) @ model.vision_encoder.proj, dim=-1)
        texts = F.normalize(model.text_encoder(tokens[chosen]), dim=-1)
        logits, same = clips @ texts.T / model.temp.clamp(0.02, 1), torch.arange(len(chosen))
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    loss = _train("ViCLIP", model, steps, 1e-3, loss_of)
    torch.save(model.state_dict(), folder / "ViClip-InternVid-10M-FLT.pth")
    return loss


UMT_FRAMES = Middle(16).indices(9, FPS)  # as the evaluator takes them: nine, and the last one again
MIRRORED = {"left": "right", "right": "left"}
BACKWARDS = {**MIRRORED, "up": "down", "down": "up"}


def _turned(action: str, ways: Mapping[str, str]) -> int:
    """The class of an action whose directions are renamed."""
    return ACTIONS.index(" ".join(ways.get(word, word) for word in action.split()))


def _umt_pixels(clip: Tensor) -> Tensor:
    """uint8 [T, 3, side, side] -> what UMT reads of each frame, float32 [T, 3, 224, 224]."""
    return IMAGENET.normalise(F.interpolate(clip, size=(256, 256), mode="bilinear")[..., 16:240, 16:240].float() / 255)


@torch.no_grad()
def _whiten_patches(model: UmtModel, pixels: Tensor) -> None:
    """Make the projection of patches their whitened principal components, from frames [N, 3, 224, 224].

    A projection at random sees little but the brightness of the ground, and the network stays at chance.
    """
    projection, side = model.patch_embed.proj, model.sizes.patch_size
    patches = F.unfold(pixels, side, stride=side).transpose(1, 2).flatten(0, 1)
    centre = patches.mean(0)
    _, sizes, axes = torch.svd_lowrank(patches - centre, q=model.sizes.width, niter=3)
    spread = sizes / len(patches) ** 0.5
    weight = (axes / spread.clamp_min(spread[0] / 100)).T
    projection.weight.copy_(weight.view_as(projection.weight))
    assert projection.bias is not None
    projection.bias.copy_(-weight @ centre)


@torch.no_grad()
def _umt_tokens(projection: nn.Module, clips: Iterable[Tensor]) -> Tensor:
    """Tokens [B, T, patches, width] of clips of T frames, each frame projected once."""
    return torch.stack([projection(_umt_pixels(clip)[None])[0].unflatten(0, (len(clip), -1)) for clip in clips])


def train_umt(folder: Path, seed: int, steps: int = 2000) -> float:
    """The projection of patches is not trained, so that each frame goes through it once; clips run backwards too."""
    torch.manual_seed(seed)
    model, rng = UmtModel(UmtSizes(224, 56, 16, 64, 2, 256, len(ACTIONS))), np.random.default_rng(seed)
    model.fill()
    drawn = _clips(1500, seed + 1, FRAME, counts=(1.0, 0.0))
    _whiten_patches(model, _umt_pixels(torch.stack([clip[k % 9] for k, (_, clip) in enumerate(drawn[:300])])))
    # What is trained reads tokens [B, 16 * patches, width].
    projection, model.patch_embed = model.patch_embed.requires_grad_(False), nn.Identity()  # type: ignore[assignment]
    names, clips = [action_of(item) for item, _ in drawn], [clip for _, clip in drawn]
    tokens = torch.cat([_umt_tokens(projection, clips), _umt_tokens(projection, (clip.flip(-1) for clip in clips))])
    targets = [_turned(name, {}) for name in names] + [_turned(name, MIRRORED) for name in names]
    ways = torch.tensor([targets, [_turned(ACTIONS[each], BACKWARDS) for each in targets]])

    def loss_of(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.choice(len(tokens), 16, replace=False))
        back = torch.from_numpy(rng.integers(2, size=16))
        seen = torch.where(back.view(-1, 1, 1, 1) > 0, tokens[chosen].flip(1), tokens[chosen])
        return F.cross_entropy(model(seen[:, UMT_FRAMES].flatten(1, 2)), ways[back, chosen])

    loss = _train("UMT", model, steps, 2e-3, loss_of)
    _tell_held_out(model, projection, seed + 50)
    model.patch_embed = projection
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(".k_bias")}
    torch.save(state, folder / "l16_ptk710_ftk710_ftk400_f16_res224.pth")
    (folder / "actions.txt").write_text("\n".join(ACTIONS) + "\n")
    return loss


@torch.no_grad()
def _tell_held_out(model: UmtModel, projection: nn.Module, seed: int) -> None:
    """Print how the classifier does on captions that training never shows; the clips are not those that are scored."""
    items = _clips(200, seed, FRAME, held_out=True, counts=(1.0, 0.0))
    targets = torch.tensor([_turned(action_of(item), {}) for item, _ in items])
    logits = model(_umt_tokens(projection, (clip for _, clip in items))[:, UMT_FRAMES].flatten(1, 2))
    loss, best, ways = F.cross_entropy(logits, targets).item(), logits.topk(5)[1], len(ACTIONS) // len(KINDS)
    classes, asked = torch.arange(len(ACTIONS)), targets[:, None]
    kind, way = classes // ways == asked // ways, classes % ways == asked % ways
    passed = torch.tensor([[shown(row, place) for place in range(len(ACTIONS))] for row in logits])
    rates = {
        "loss": loss,
        "right": (best[:, 0] == targets).float().mean().item(),
        "right in the top five": (best == asked).any(1).float().mean().item(),
        "right kind": kind.gather(1, best[:, :1]).float().mean().item(),
        "right direction": way.gather(1, best[:, :1]).float().mean().item(),
        **{
            f"passed, {name}": passed[where].float().mean().item()
            for name, where in (
                ("right", kind & way), ("of the kind", kind & ~way), ("of the direction", way & ~kind),
                ("of neither", ~kind & ~way),
            )
        },
    }  # fmt: skip
    print("UMT on 200 clips of held-out captions:", "; ".join(f"{name} {value:.2f}" for name, value in rates.items()))


def train_dino(folder: Path, seed: int, steps: int = 300) -> float:
    """A ViT that tells kinds, colours and backgrounds of one shape apart, instead of DINO's distillation."""
    torch.manual_seed(seed)
    vit, rng = build_vit(VitSizes(128, 2, 256, 16, 14)), np.random.default_rng(seed)
    for value in (each for each in vit.parameters() if each.ndim > 1):
        nn.init.trunc_normal_(value, std=0.02)
    model = nn.ModuleDict({"vit": vit, "head": nn.Linear(128, len(KINDS) * len(COLOURS))})
    items = _clips(600, seed + 1, FRAME, counts=(1.0, 0.0))
    names = [item.caption.movers[0].item for item, _ in items]
    targets = torch.tensor([KINDS.index(one.kind) * len(COLOURS) + COLOURS.index(one.colour) for one in names])

    def loss_of(step: int) -> Tensor:
        chosen = rng.choice(len(items), 12, replace=False)
        frames = torch.stack([items[i][1][rng.integers(9)] for i in chosen]).float() / 255
        tokens = vit_tokens(vit, IMAGENET.normalise(resize_short(frames, 224)))
        return F.cross_entropy(model["head"](vit.norm(tokens[:, 0])), targets[chosen])

    loss = _train("DINO", model, steps, 1e-3, loss_of)
    torch.save(vit.state_dict(), folder / "dino_vitbase16_pretrain.pth")
    return loss


TRAINED: dict[str, Callable[[Path, int], float]] = {
    "raft": train_raft,
    "amt": train_amt,
    "musiq": train_musiq,
    "viclip": train_viclip,
    "umt": train_umt,
    "dino": train_dino,
}
"""Name -> what trains it into a folder from a seed and gives its last loss."""
