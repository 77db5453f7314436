"""`python -m infra.audit`: is each image's bill whole, and is something in it known to be unsafe?

Ends with 0 where all is well; with 1 where a Dockerfile breaks a rule, a bill has a gap, a
vulnerability is not waived or a waiver has expired; with 69 where nothing of that was found but the
advisory service did not answer for every package, so that nothing is proven.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from packaging.utils import canonicalize_name

from infra.advisories import Answer, Found, ask_service, read_files
from infra.images.bill import schema_error
from infra.images.contents import FOLDER, IMAGES, Image
from infra.images.dockerfiles import complaints
from infra.images.lock import read_lock
from infra.waivers import Waiver, read_waivers
from pipeline.core.errors import PipelineError

FINE, RED, NOT_AUDITED = 0, 1, 69
"""69 is EX_UNAVAILABLE of sysexits.h."""
WAIVERS = FOLDER / "waivers.toml"
_NAMED = 5


def main() -> None:
    """Parse, audit, say what was found."""
    parser = argparse.ArgumentParser(prog="python -m infra.audit", description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--service", choices=["pypi", "osv"], default="pypi")
    parser.add_argument("--osv-url", help="address of a mirror of OSV's query interface")
    parser.add_argument(
        "--advisories", type=Path, help="advisories in OSV's format (file, folder, zip): no network"
    )
    parser.add_argument("--waivers", type=Path, default=WAIVERS)
    asked = parser.parse_args()
    if unknown := set(asked.images) - set(IMAGES):
        parser.error(f"no such image: {', '.join(sorted(unknown))}; known: {', '.join(IMAGES)}")
    images = [IMAGES[name] for name in asked.images or IMAGES]
    today = datetime.now(UTC).date()
    try:
        waivers = read_waivers(asked.waivers, today)
        faults = [said for image in images for said in gaps(image)]
        packages = versions(images)
        if asked.advisories is not None:
            answer = read_files(packages, asked.advisories)
        else:
            more = ["--osv-url", asked.osv_url] if asked.osv_url else []
            answer = ask_service(packages, ["--vulnerability-service", asked.service, *more])
    except PipelineError as error:
        sys.exit(str(error))
    lines, status = judge(faults, answer, waivers, today)
    print(f"{len(packages)} packages in {', '.join(image.name for image in images)}")
    print("\n".join(lines))
    sys.exit(status)


def versions(images: Iterable[Image]) -> dict[str, str]:
    """Version by name, of all images together; they share their pins."""
    return {
        entry.name: entry.version
        for image in images
        for entry in read_lock(image.lock.read_text()).values()
    }


def gaps(image: Image) -> list[str]:
    """What the Dockerfile, or the bill against the lock, leaves to be wished."""
    said = [f"{image.dockerfile}:{one}" for one in complaints(image.dockerfile.read_text())]
    return said + bill_gaps(image.name, image.lock.read_text(), image.bill.read_text())


def bill_gaps(image: str, lock: str, bill: str) -> list[str]:
    """Where a bill does not say of each locked package its version, hashes and licence."""
    if error := schema_error(bill):
        return [f"{image}: the bill does not meet CycloneDX's schema: {error}"]
    billed = {canonicalize_name(c["name"]): c for c in json.loads(bill)["components"]}
    locked = read_lock(lock)
    again = f"Make it anew: python -m infra.images.lock {image}"
    said = []
    for name in sorted(set(billed) ^ set(locked)):
        where = "bill" if name in billed else "lock"
        said.append(f"{image}: {name} is in the {where} alone. {again}")
    for name in sorted(set(billed) & set(locked)):
        component, entry = billed[name], locked[name]
        hashes = sorted(h["content"] for h in component.get("hashes", ()) if h["alg"] == "SHA-256")
        if component.get("version") != entry.version or hashes != sorted(entry.hashes):
            said.append(f"{image}: bill and lock differ in {name}. {again}")
        if not component.get("licenses"):
            said.append(f"{image}: the bill has no licence of {name}. {again}")
    return said


def judge(
    faults: Sequence[str], answer: Answer, waivers: Sequence[Waiver], today: date
) -> tuple[list[str], int]:
    """What to print, and the exit status."""
    lines = list(faults)
    for waiver in waivers:
        if waiver.expires < today:
            lines.append(
                f"the waiver of {waiver.id} ({waiver.package}) ended on {waiver.expires}: take a "
                "version without it, or look again and waive it anew"
            )
    valid = [waiver for waiver in waivers if waiver.expires >= today]
    for one in answer.found:
        if not any(waiver.covers(one.package, one.ids) for waiver in valid):
            lines.append(_unsafe(one))
    status = RED if lines else FINE
    for waiver in valid:
        hits = any(waiver.covers(one.package, one.ids) for one in answer.found)
        lines.append(
            f"waived until {waiver.expires}: {waiver.id} ({waiver.package}): {waiver.reason}"
            if hits
            else f"the waiver of {waiver.id} ({waiver.package}) covers nothing that was found"
        )
    if answer.not_audited:
        lines += _not_audited(answer.not_audited)
        status = status or NOT_AUDITED
    return lines or ["nothing is known against them"], status


def _unsafe(one: Found) -> str:
    cure = f"mended in {', '.join(one.fixed)}" if one.fixed else "no version without it is known"
    names = ", ".join(sorted(one.ids))
    return f"{one.package} {one.version}: {names}; {cure}"


def _not_audited(missing: Mapping[str, str]) -> list[str]:
    reasons = sorted({re.sub(r": [\w.-]+ \([^)]*\)$", "", reason) for reason in missing.values()})
    names = ", ".join(sorted(missing)[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
    return [
        f"NOT AUDITED: {len(missing)} packages ({names}), so this is no all-clear.",
        *(f"  {reason}" for reason in reasons[:_NAMED]),
        "  The advisory service cannot be reached from here, or does not know them. Where it "
        "cannot be: --advisories FILE, FOLDER or all.zip of OSV's PyPI advisories.",
    ]


if __name__ == "__main__":
    main()
