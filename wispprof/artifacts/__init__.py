"""What lies on disk: profiles, traces, estimators, predictors and plans.

Every file states its schema version, its provenance and a hash of its content; every write is atomic;
reading a damaged or newer file names the fault and what to do. JSON and numpy only, never pickle.
"""

from wispprof.artifacts.document import Document, read_document, write_document
from wispprof.artifacts.files import bundled_model, bundled_path
from wispprof.artifacts.journal import RowJournal
from wispprof.artifacts.manifest import Manifest, Provenance
from wispprof.artifacts.profile import (
    EdgeProfile,
    LinkProfile,
    Profile,
    ServerProfile,
    load_edge,
    load_link,
    load_profile,
    load_server,
    make_profile,
    save_profile,
)
from wispprof.artifacts.rows import AcceptanceTrace, EdgeRow, LinkRow, StepRow, TracePath
from wispprof.artifacts.trace import load_trace, save_trace, trace_hash

__all__ = [
    "AcceptanceTrace",
    "Document",
    "EdgeProfile",
    "EdgeRow",
    "LinkProfile",
    "LinkRow",
    "Manifest",
    "Profile",
    "Provenance",
    "RowJournal",
    "ServerProfile",
    "StepRow",
    "TracePath",
    "bundled_model",
    "bundled_path",
    "load_edge",
    "load_link",
    "load_profile",
    "load_server",
    "load_trace",
    "make_profile",
    "read_document",
    "save_profile",
    "save_trace",
    "trace_hash",
    "write_document",
]
