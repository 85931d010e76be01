"""Every setting: its unit, its default, its reason. Read once at the start (`load_settings`), passed in, never changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import StartupError

MIB = 1 << 20


class Settings(BaseSettings):
    """The settings of one process, from `ESPALIER_*` variables; frozen."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_", frozen=True, extra="ignore")

    home: Path = Field(
        default=Path("~/.espalier"), description="Folder of all embedded state: database, objects, cache, scratch."
    )
    host: str = Field(
        default="127.0.0.1", description="Address the API listens on. Anything but loopback needs api_key."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port the API listens on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        default=None, description="Bearer key that every /v1 request must carry; none: loopback only."
    )
    database_url: str | None = Field(
        default=None, description="SQLAlchemy URL; default: SQLite at <home>/espalier.sqlite."
    )
    storage_url: str | None = Field(
        default=None, description="Object store URL (file:, s3:, gs:, az:); default: <home>/objects."
    )
    broker_url: str | None = Field(
        default=None, description="Redis URL of the Celery broker; none: workers poll the database."
    )
    data_path: Path | None = Field(
        default=None,
        description="Folder with the original files of built-in data sets, for machines without a network.",
    )
    data_offline: bool = Field(default=False, description="Never download a built-in data set: local sources only.")
    slots: int = Field(default=1, ge=1, le=64, description="Jobs that one worker runs side by side: one per GPU.")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="torch's threads in each trainer; default: cores / workers."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:<n>.")
    poll_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="Seconds between two looks of an idle worker at the queue: bounds the cost of a lost ring.",
    )
    lease_s: float = Field(
        default=60,
        gt=0,
        description="Seconds a worker owns a job without renewing: a dead worker's job runs again after it.",
    )
    renew_s: float = Field(
        default=10,
        gt=0,
        description="Seconds between two renewals of the lease: a sixth of it, so that three may fail.",
    )
    self_fence_s: float = Field(
        default=40,
        gt=0,
        description="Seconds after the last good renewal at which a worker kills its own trainer: well inside the lease.",
    )
    sweep_s: float = Field(default=10, gt=0, description="Seconds between two sweeps of recovery.")
    checkpoint_s: float = Field(default=60, gt=0, description="Seconds between two checkpoints inside a long epoch.")
    silence_s: float = Field(
        default=300, gt=0, description="Seconds without a line after which a training process counts as hung."
    )
    job_time_limit_s: float = Field(default=7 * 86400, gt=0, description="Seconds one attempt of a job may run.")
    max_spec_bytes: int = Field(default=MIB, gt=0, description="Largest job description.")
    max_upload_bytes: int = Field(default=2048 * MIB, gt=0, description="Largest upload of a data set or of weights.")
    max_unpacked_bytes: int = Field(
        default=20480 * MIB, gt=0, description="Largest sum of the members of an uploaded archive."
    )
    max_params: int = Field(default=500_000_000, gt=0, description="Largest network: ONNX files end at 2 GiB.")
    max_training_bytes: int = Field(
        default=64 * 1024 * MIB, gt=0, description="Largest estimate of a training's memory."
    )
    max_epochs: int = Field(default=10_000, gt=0, description="Most epochs in one training.")

    @model_validator(mode="after")
    def _lease_in_order(self) -> Self:
        if not self.renew_s < self.self_fence_s < self.lease_s:
            raise ValueError(
                "ESPALIER_RENEW_S < ESPALIER_SELF_FENCE_S < ESPALIER_LEASE_S must hold "
                f"(they are {self.renew_s:g}, {self.self_fence_s:g}, {self.lease_s:g}): a worker ends its own trainer before its lease is over"
            )
        return self

    @property
    def home_folder(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def database(self) -> str:
        """The SQLAlchemy URL that is used."""
        return self.database_url or f"sqlite:///{self.home_folder / 'espalier.sqlite'}"

    @property
    def storage(self) -> str:
        """The object store URL that is used."""
        return self.storage_url or (self.home_folder / "objects").as_uri()

    @property
    def cache(self) -> Path:
        """Folder of packed data sets on this machine; may be deleted while no worker runs."""
        return self.home_folder / "cache"

    @property
    def scratch(self) -> Path:
        """Folder of running attempts; emptied at every start."""
        return self.home_folder / "scratch"

    @property
    def doorbells(self) -> Path:
        """Folder in which each worker of this machine notes the port of its doorbell."""
        return self.home_folder / "doorbells"


def load_settings(**overrides: object) -> Settings:
    """The settings of this process: `overrides` over `ESPALIER_*` variables over defaults.

    Raises StartupError; it names the variable, not its value, which may be a secret.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        if not first["loc"]:
            raise StartupError(first["msg"].removeprefix("Value error, ")) from error
        name = str(first["loc"][0])
        given = f"the given {name}" if name in overrides else f"ESPALIER_{name.upper()}"
        raise StartupError(f"{given} is not valid: {first['msg'].lower()}") from error


def trainer_threads(settings: Settings, workers: int = 1) -> int:
    """The threads of each trainer: the setting, else the machine's cores divided by its trainers, at least 1."""
    return settings.threads or max(1, (os.cpu_count() or 1) // max(1, workers * settings.slots))
