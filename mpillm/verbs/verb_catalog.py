"""The verbs of `mpillm`, in the order of the help: name → class.

A verb is a frozen dataclass. Its fields are the options (system/command_line.py), its docstring is
the help, `example` is a command to copy, and `run()` does the work. `mpillm package.module:Name`
runs a verb of a user's own.
"""

from collections.abc import Mapping
from types import MappingProxyType

VERBS: Mapping[str, str] = MappingProxyType(
    {
        "prepare": "mpillm.verbs.prepare:Prepare",
        "train": "mpillm.verbs.train:Train",
        "evaluate": "mpillm.verbs.evaluate:Evaluate",
        "lm-eval": "mpillm.verbs.lm_eval:LmEval",
        "programs": "mpillm.verbs.programs:Programs",
        "contamination": "mpillm.verbs.contamination:ContaminationOptions",
        "memorisation": "mpillm.verbs.memorisation:MemorisationOptions",
        "generate": "mpillm.verbs.generate:Generate",
        "serve": "mpillm.verbs.serve:Serve",
        "chat": "mpillm.verbs.chat:TerminalChat",
        "inspect": "mpillm.verbs.inspect:Inspect",
        "import": "mpillm.verbs.import_:Import",
        "export": "mpillm.verbs.export:Export",
        "compress": "mpillm.verbs.compress:Compress",
        "bench": "mpillm.verbs.bench:Bench",
        "schedule": "mpillm.verbs.schedule:Schedule",
        "doctor": "mpillm.verbs.doctor:Doctor",
        "submit": "mpillm.verbs.submit:Submit",
        "status": "mpillm.verbs.status:Status",
        "report": "mpillm.verbs.report:Report",
    }
)

REFUSED: Mapping[tuple[str, str], str] = MappingProxyType({("schedule", "--stages"): "--ranks"})
"""Spellings of earlier versions, (verb, option) → the option's name now."""
