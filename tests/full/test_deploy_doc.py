"""docs/deploy.md, followed to the letter on the local AWS: deployed, run, removed again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import docker
import docker.errors
import pytest

from tests.full.containers import BASE, missing
from tests.full.local_aws import ROOT, TOOLS, LocalAws, Shell, local_aws, tool

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

DOCUMENT = ROOT / "docs/deploy.md"
BUILD = f"--network host --build-arg PYTHON_IMAGE={BASE} --build-arg ENGINE=onnx"
REMOVAL = "## 8. Remove everything"


class Deployed(NamedTuple):
    aws: LocalAws
    shell: Shell
    said: str

    def output(self, name: str) -> str:
        with self.aws.client("cloudformation") as client:
            outputs = client.describe_stacks(StackName="cosmic")["Stacks"][0]["Outputs"]
        found = {output["OutputKey"]: output["OutputValue"] for output in outputs}
        return str(found[name])

    def invoke(self, function: str, event: dict[str, Any]) -> dict[str, Any]:
        """Invoke a function; returns its answer, or its error."""
        with self.aws.client("lambda") as client:
            answer = client.invoke(FunctionName=function, Payload=json.dumps(event))
            given: dict[str, Any] = json.load(answer["Payload"])
            return given


def commands(text: str) -> str:
    """All commands in order: those for an account, too, but where it takes Docker to AWS itself."""
    blocks = re.findall(r"^```sh( account| machine)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return "\n".join(block for _, block in blocks if "docker login" not in block)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The document up to its finished run."""
    tool("sam")
    if why := missing():
        pytest.skip(why)
    if not shutil.which("aws", path=f"{os.environ['PATH']}:{TOOLS}/aws/bin"):
        pytest.skip("needs AWS's command line, `aws`: run `make tools`")
    folder = tmp_path_factory.mktemp("deploy")
    project = copy_project(folder / "project")
    with (
        local_aws(folder) as aws,
        Shell(project, folder / "shell.log", **aws.variables, BUILD=BUILD) as shell,
    ):
        before = DOCUMENT.read_text().split(REMOVAL)[0]
        said = shell.run(commands(before))
        yield Deployed(aws, shell, said)
        shell.run('docker image rm --force "$REGISTRY/server:$TAG" "$REGISTRY/worker:$TAG"')
        forget_builds(said)


def forget_builds(said: str) -> None:
    """Remove the steps of the builds, each as large as an image, from the engine's cache."""
    engine = docker.from_env()
    base = engine.images.get(BASE).id
    for step in reversed(re.findall(r"^ ---> ([0-9a-f]{12})$", said, re.MULTILINE)):
        with contextlib.suppress(docker.errors.APIError):
            if step not in base and not (image := engine.images.get(step)).tags:
                image.remove()
    engine.close()


def copy_project(target: Path) -> Path:
    """Copy what a clone would have, with this one's environment and tools."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    for name in (".venv", ".tools"):
        (target / name).unlink(missing_ok=True)
        (target / name).symlink_to((ROOT / name).resolve())
    return target


def test_what_cannot_be_run_here_is_shell_at_least() -> None:
    blocks = re.findall(r"^```sh.*?\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert [block for block in blocks if "docker push" in block]
    assert [block for block in blocks if "networkInterfaceId" in block]
    for block in blocks:
        done = subprocess.run(
            ["bash", "-n"], input=block, text=True, capture_output=True, check=False
        )
        assert not done.stderr, f"{block}\n{done.stderr}"


def test_the_run_has_finished_with_a_table_of_all_ranks(deployed: Deployed) -> None:
    assert "1,253" in deployed.said, deployed.said
    assert re.search(r"results/\S+/summary.json", deployed.said), deployed.said
    summary = run_summary(deployed)
    assert summary["rows"] == 1253
    assert summary["world_size"] == 4
    # Each rank counts its three links, and containers of one network see each other.
    assert summary["links"]["direct"] + summary["links"]["relay"] >= 8


def run_summary(deployed: Deployed) -> dict[str, Any]:
    key = re.findall(r"results/\S+/summary.json", deployed.said)[0]
    with deployed.aws.client("s3") as s3:
        body = s3.get_object(Bucket=deployed.output("BucketName"), Key=key)["Body"]
        found: dict[str, Any] = json.load(body)
        return found


def test_the_function_that_checks_is_admitted_and_sees_its_address(deployed: Deployed) -> None:
    line = next(line for line in deployed.said.splitlines() if line.startswith('{"server"'))
    report = json.loads(line)
    assert report["ok"], report
    assert report["observed"] is not None


def test_functions_may_not_do_what_their_roles_do_not_say(deployed: Deployed) -> None:
    bucket = deployed.output("BucketName")
    event = {"world_size": 1, "engine": "onnx", "fmi_enabled": False, "ranks_file": True}
    data, results = f"s3://{bucket}/datasets/small", f"s3://{bucket}/results"
    assert "ranks_file" in deployed.invoke(
        "cosmic-init", event | {"data": data, "results": results}
    )
    elsewhere = deployed.invoke(
        "cosmic-init", event | {"data": data, "results": f"s3://{bucket}/models"}
    )
    assert "models" in elsewhere["errorMessage"]
    assert "access denied" in elsewhere["errorMessage"]
    configs = deployed.invoke(
        "cosmic-init", event | {"data": f"s3://{bucket}/configs", "results": results}
    )
    assert "access denied" in configs["errorMessage"]


def test_a_run_that_fails_names_its_rank_by_what_the_roles_allow(deployed: Deployed) -> None:
    bucket = deployed.output("BucketName")
    event = {
        "world_size": 2,
        "data": f"s3://{bucket}/datasets/small",
        "results": f"s3://{bucket}/results",
        "engine": "onnx",
        "rendezvous_endpoint": "127.0.0.1:9",  # nobody listens in a function
        "timeout": 2,
        "attempts": 1,
    }
    with deployed.aws.client("stepfunctions") as states:
        started = states.start_execution(
            stateMachineArn=deployed.output("StateMachineArn"), input=json.dumps(event)
        )
        while (end := states.describe_execution(executionArn=started["executionArn"]))[
            "status"
        ] == "RUNNING":
            time.sleep(0.2)
    assert end["status"] == "FAILED"
    assert re.search(r"rank [01]", end["cause"]), end["cause"]
    assert "denied" not in end["cause"]
    with deployed.aws.client("s3") as s3:
        listed = s3.list_objects_v2(Bucket=bucket, Prefix="results/")["Contents"]
    assert [item for item in listed if "/failed/0/" in item["Key"]]


def test_no_secret_stands_in_what_the_run_has_written(deployed: Deployed) -> None:
    secrets = [deployed.output(name) for name in ("ServerSecretArn", "KeyArn")]
    with deployed.aws.client("secretsmanager") as client:
        values = [client.get_secret_value(SecretId=arn)["SecretString"] for arn in secrets]
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in values)
    assert values[0] != values[1]
    logs = ("WorkerLogGroup", "ServerLogGroup", "MachineLogGroup")
    with deployed.aws.client("logs") as client:
        for group in (deployed.output(name) for name in logs):
            text = json.dumps(client.filter_log_events(logGroupName=group)["events"])
            assert not any(value in text for value in values), group
    assert not any(value in deployed.said for value in values)


def test_everything_is_removed_again(deployed: Deployed) -> None:
    said = deployed.shell.run(commands(REMOVAL + DOCUMENT.read_text().split(REMOVAL)[1]))
    assert said.strip() in ("", "None")
    with deployed.aws.client("s3") as s3, deployed.aws.client("ecr") as ecr:
        assert s3.list_buckets()["Buckets"] == []
        assert ecr.describe_repositories()["repositories"] == []
    with deployed.aws.client("logs") as logs, deployed.aws.client("secretsmanager") as secrets:
        groups = [group["logGroupName"] for group in logs.describe_log_groups()["logGroups"]]
        assert not [name for name in groups if "cosmic" in name]
        assert secrets.list_secrets()["SecretList"] == []
