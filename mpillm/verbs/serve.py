"""`mpillm serve`."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, Debug, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.evaluate import Device
from mpillm.verbs.job import first_process, limit_torch_threads, open_job

LONGEST_SECONDS = 30 * 86_400
Tensor = Annotated[
    int,
    Option(
        "Ranks that share each layer; 0: all that --pipeline leaves.", minimum=0, maximum=1 << 20
    ),
]
Pipeline = Annotated[
    int,
    Option("Ranks that have some layers each; 0: the others.", minimum=0, maximum=1 << 20),
]
DType = Annotated[Literal["float32", "bfloat16"], Option("Of weights, activations, and the cache.")]
ContextTokens = Annotated[
    int | None,
    Option("Tokens of a prompt and its text together; else the model's.", minimum=2),
]


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP with OpenAI's API, and a page to talk to it; rank 0 listens.

    SIGUSR1, and the end of a batch job, let requests finish; it leaves with the exit code 75.

    `--new-token NAME` adds a token to the file of `--tokens`, prints it once, and leaves.
    """

    example: ClassVar = "mpirun -n 2 mpillm serve runs/quickstart --tensor 2 --port 8000"
    # The answers are the result: a closed standard output ends no server.
    prints_its_result: ClassVar = False

    trained: Annotated[
        Path | None,
        Argument("A run, a checkpoint, a Hugging Face folder or a GGUF file.", metavar="RUN"),
    ] = None
    tensor: Tensor = 0
    pipeline: Pipeline = 0
    host: Annotated[
        str, Option("The address to listen at; others than this host's own need tokens and TLS.")
    ] = "127.0.0.1"
    port: Annotated[int, Option("0: any that is free.", minimum=0, maximum=65535)] = 8000
    served_model_name: Annotated[
        tuple[str, ...], Option("The model's name; again for another. Else the folder's.")
    ] = ()
    context: ContextTokens = None
    dtype: DType = "float32"
    cache_tokens: Annotated[
        int | None,
        Option("Tokens of all texts that are kept at once; else of 8 contexts.", minimum=1),
    ] = None
    tokens: Annotated[
        Path | None, Option("A file of bearer tokens, with the mode 0600; else none is asked for.")
    ] = None
    new_token: Annotated[str, Option("Add a token of this name to --tokens, and print it.")] = ""
    days: Annotated[
        float | None, Option("With --new-token: days until it expires; else never.", minimum=0)
    ] = None
    requests_a_minute: Annotated[
        int, Option("With --new-token: how many it may ask; 0: any.", minimum=0)
    ] = 0
    certificate: Annotated[Path | None, Option("TLS: a certificate in PEM, with its chain.")] = None
    key: Annotated[Path | None, Option("TLS: the key of the certificate.")] = None
    audit: Annotated[
        Path | None, Option("Append who asked what and when to this file; no contents.")
    ] = None
    queue: Annotated[
        int, Option("Texts that wait at once; more are refused.", minimum=1, maximum=1 << 20)
    ] = 256
    body_bytes: Annotated[
        int, Option("The largest body of a request.", minimum=1000, maximum=1 << 30)
    ] = 4 << 20
    request_seconds: Annotated[
        float, Option("For one answer.", minimum=0.1, maximum=LONGEST_SECONDS)
    ] = 600.0
    drain_seconds: Annotated[
        float, Option("For what runs when it ends.", minimum=0, maximum=LONGEST_SECONDS)
    ] = 600.0
    device: Device = "auto"
    debug: Debug = False

    def __post_init__(self) -> None:
        if self.new_token:
            if self.tokens is None:
                raise UsageError("--new-token adds to a file of tokens; name it: --tokens FILE")
            return
        if self.trained is None:
            raise UsageError("mpillm serve needs a RUN to serve, such as runs/quickstart")
        if self.days is not None or self.requests_a_minute:
            raise UsageError("--days and --requests-a-minute are of a --new-token NAME; give it")
        if any(not name or not name.isprintable() for name in self.served_model_name):
            raise UsageError("--served-model-name is a name of visible characters")

    def run(self) -> None:
        if self.new_token:
            self._print_token()
            return
        from mpillm.launch.current_job import current_job, job_end
        from mpillm.launch.signals import StopSignals

        # Caught from here on: a signal that comes while weights load ends the server, too.
        begun, signals = time.time(), StopSignals()
        with open_job(self.debug, stops_in_order=True) as job:
            require_packages("mpillm serve", "torch", "starlette", "uvicorn", "prometheus_client")
            limit_torch_threads(job.threads)
            from mpillm.infer.serve.http.lifetime import HttpLimits
            from mpillm.infer.serve.http.listening import ListeningOptions
            from mpillm.infer.serve.open_engine import EngineOptions
            from mpillm.infer.serve.serve_model import JobFacts, ServeOptions, serve_model

            assert self.trained is not None
            listening = ListeningOptions(
                self.host, self.port, self.tokens, self.certificate, self.key
            )
            limits = HttpLimits(self.body_bytes, answer_seconds=self.request_seconds)
            options = ServeOptions(
                self.trained,
                listening,
                self.served_model_name,
                self.audit,
                limits,
                self.drain_seconds,
            )
            facts = JobFacts(
                begun,
                job_end(os.environ, begun, job.console.warn),
                _submit_host(),
                current_job(os.environ) is not None,
            )
            engine = EngineOptions(
                tensor=self.tensor,
                pipeline=self.pipeline,
                device=self.device,
                context=self.context,
                dtype=self.dtype,
                cache_tokens=self.cache_tokens,
                queue=self.queue,
            )
            serve_model(options, engine, job.comm, job.console, signals, facts)

    def _print_token(self) -> None:
        with first_process(self.debug) as console:
            from mpillm.infer.serve.http.bearer_tokens import new_token

            assert self.tokens is not None
            token = new_token(self.tokens, self.new_token, self.days, self.requests_a_minute)
            # The token alone, so that a script can take it: it is shown once.
            console.write(f"{token}\n")


def _submit_host() -> str:
    """Return the login node that the job was submitted from, where the batch system names it."""
    names = ("SLURM_SUBMIT_HOST", "PBS_O_HOST", "LSB_SUB_HOST")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")
