"""deploy/*.yaml: what linters say, what roles may, and what a deployment makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.full.local_aws import ROOT, LocalAws, local_aws, tool

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

TEMPLATE = ROOT / "deploy/template.yaml"
REGISTRY = ROOT / "deploy/registry.yaml"
IMAGES = "123456789012.dkr.ecr.us-east-1.amazonaws.com/unused"

# What may stand beside "*": actions that know no resources (service authorization reference).
WITHOUT_RESOURCES = {
    "ecr:GetAuthorizationToken",
    "logs:CreateLogDelivery",
    "logs:DeleteLogDelivery",
    "logs:DescribeLogGroups",
    "logs:DescribeResourcePolicies",
    "logs:GetLogDelivery",
    "logs:ListLogDeliveries",
    "logs:PutResourcePolicy",
    "logs:UpdateLogDelivery",
}


def call(*command: str, **variables: str) -> str:
    """Run a tool; returns what it wrote, and fails with it."""
    environment = os.environ | {"SAM_CLI_TELEMETRY": "0", "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment | variables, check=False
    )
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@cache
def resources(template: Path) -> dict[str, Any]:
    """The resources of a template; CloudFormation's short forms (!Ref) written out."""
    read = (
        "import json, sys; from samcli.yamlhelper import yaml_parse; "
        "print(json.dumps(yaml_parse(open(sys.argv[1]).read())))"
    )
    python = str(Path(tool("sam")).parent / "python")
    found: dict[str, Any] = json.loads(call(python, "-c", read, str(template)))["Resources"]
    return found


def statements() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every statement of every role, with the role's name."""
    for name, resource in resources(TEMPLATE).items():
        for policy in resource.get("Properties", {}).get("Policies", ()):
            for statement in policy["PolicyDocument"]["Statement"]:
                yield name, statement


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def allowed(role: str, action: str) -> list[str]:
    """What the role may do this to, as text."""
    found = [s["Resource"] for name, s in statements() if name == role and action in s["Action"]]
    return sorted(json.dumps(item) for resource in found for item in listed(resource))


def test_cfn_lint_and_sam_find_nothing() -> None:
    call(tool("cfn-lint"), str(TEMPLATE), str(REGISTRY))
    call(tool("sam"), "validate", "--lint", "--template", str(TEMPLATE))


def test_checkov_finds_nothing_that_is_not_explained() -> None:
    options = ("--framework", "cloudformation", "--quiet", "--skip-download", "-o", "json")
    report = json.loads(call(tool("checkov"), "-d", str(ROOT / "deploy"), *options))
    assert report["summary"]["failed"] == 0
    assert report["summary"]["passed"] > 50, "it has not looked"
    for template in (TEMPLATE, REGISTRY):
        for name, resource in resources(template).items():
            for skip in resource.get("Metadata", {}).get("checkov", {}).get("skip", ()):
                assert len(skip["comment"]) > 20, f"{name}: {skip['id']} is not explained"


def test_roles_have_no_resource_too_many() -> None:
    seen = set()
    for role, statement in statements():
        actions = set(listed(statement["Action"]))
        assert not [action for action in actions if "*" in action], f"{role}: {actions}"
        if "*" in listed(statement["Resource"]):
            assert actions <= WITHOUT_RESOURCES, f"{role}: * for {actions - WITHOUT_RESOURCES}"
            seen |= actions
    assert seen == WITHOUT_RESOURCES, "the list above allows what nobody needs"
    for template in (TEMPLATE, REGISTRY):
        text = template.read_text()
        assert not re.findall(r'Resource: ["\']?\*["\']?\s*$', text, re.MULTILINE), "say why"
        for resource in resources(template).values():
            assert "ManagedPolicyArns" not in resource.get("Properties", {})
    assert "FullAccess" not in TEMPLATE.read_text()


def test_only_ranks_and_the_server_know_secrets_and_only_results_are_written() -> None:
    readers = {role for role, s in statements() if "secretsmanager:GetSecretValue" in s["Action"]}
    assert readers == {"InferRole", "CheckRole", "ServerStartRole"}
    for role in ("CheckRole", "ServerStartRole"):
        (place,) = allowed(role, "secretsmanager:GetSecretValue")
        assert "ServerSecret" in place, role
    for role in ("InitRole", "InferRole", "SummarizeRole", "CheckRole", "MachineRole"):
        for action in ("s3:PutObject", "s3:DeleteObject"):
            assert all("/results/*" in place for place in allowed(role, action)), role
    for role in ("InitRole", "InferRole"):
        places = allowed(role, "s3:GetObject")
        assert [re.findall("/([a-z]+)/", place) for place in places] == [["datasets"], ["models"]]
    for role, statement in statements():
        if "s3:ListBucket" in statement["Action"]:
            assert statement["Condition"]["StringLike"]["s3:prefix"], role


def test_every_function_has_a_role_a_handler_and_the_one_image() -> None:
    functions = {
        name: resource["Properties"]
        for name, resource in resources(TEMPLATE).items()
        if resource["Type"] == "AWS::Serverless::Function"
    }
    assert set(functions) == {"Init", "Infer", "Summarize", "Blame", "Check"}
    assert len({json.dumps(function["ImageUri"]) for function in functions.values()}) == 1
    for name, function in functions.items():
        handler = f"lambda_worker.handlers.{name.lower()}"
        assert function["ImageConfig"]["Command"] == [handler]
        assert "VpcConfig" not in function
        assert ("Environment" in function) == (name in ("Infer", "Check"))


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalAws]:
    """A local AWS without containers: what CloudFormation makes is looked at, not run."""
    tool("sam")
    with local_aws(tmp_path_factory.mktemp("aws"), DOCKER_HOST="unix:///nowhere") as here:
        with here.client("s3") as s3:
            s3.create_bucket(Bucket="uploads")
        yield here


@pytest.fixture(scope="module")
def outputs(aws: LocalAws) -> dict[str, str]:
    """The outputs of the stack as it is without any parameter but the image's tag."""
    return deploy(aws, "cosmic")


def deploy(aws: LocalAws, stack: str, *parameters: str) -> dict[str, str]:
    """Deploy the template; returns the stack's outputs."""
    names = ("--stack-name", stack, "--template", str(TEMPLATE), "--s3-bucket", "uploads")
    options = ("--image-repository", IMAGES, "--capabilities", "CAPABILITY_IAM")
    overrides = ("--parameter-overrides", "ImageTag=1", *parameters)
    call(tool("sam"), "deploy", *names, *options, *overrides, **aws.variables)
    with aws.client("cloudformation") as cloudformation:
        found = cloudformation.describe_stacks(StackName=stack)["Stacks"][0]["Outputs"]
    return {output["OutputKey"]: output["OutputValue"] for output in found}


def test_behind_a_load_balancer_the_server_sees_the_ranks(
    aws: LocalAws, outputs: dict[str, str]
) -> None:
    assert outputs["RendezvousEndpoint"].endswith(".elb.amazonaws.com:10000")
    with aws.client("elbv2") as elb:
        group = elb.describe_target_groups()["TargetGroups"][0]
        assert (group["Protocol"], group["Port"], group["TargetType"]) == ("TCP", 10000, "ip")
        described = elb.describe_target_group_attributes(TargetGroupArn=group["TargetGroupArn"])
        attributes = {item["Key"]: item["Value"] for item in described["Attributes"]}
    assert attributes["preserve_client_ip.enabled"] == "true"
    with aws.client("stepfunctions") as states:
        machine = states.describe_state_machine(stateMachineArn=outputs["StateMachineArn"])
    assert "${" not in machine["definition"]
    assert "function:cosmic-infer" in machine["definition"]
    with aws.client("secretsmanager") as secrets:
        for name in ("ServerSecretArn", "KeyArn"):
            value = secrets.get_secret_value(SecretId=outputs[name])["SecretString"]
            assert re.fullmatch("[0-9a-f]{64}", value), name


def test_what_the_emulator_does_not_enforce_is_simulated(
    aws: LocalAws, outputs: dict[str, str]
) -> None:
    account = "000000000000"
    machine, bucket = outputs["StateMachineArn"], f"arn:aws:s3:::{outputs['BucketName']}"
    function = f"arn:aws:lambda:us-east-1:{account}:function:cosmic-"
    execution = machine.replace(":stateMachine:", ":execution:")
    images = f"arn:aws:ecr:us-east-1:{account}:repository/cosmic/"
    logs = f"arn:aws:logs:us-east-1:{account}:log-group:/cosmic"
    stream = {"logs:CreateLogStream": [f"{logs}/workers:log-stream:1"]}
    stream |= {"logs:PutLogEvents": [f"{logs}/workers:log-stream:1"]}
    may = {
        "MachineRole": {
            "lambda:InvokeFunction": [
                function + f for f in ("init", "infer", "summarize", "blame")
            ],
            "states:StartExecution": [machine],
            "states:DescribeExecution": [f"{execution}/Ranks:1", f"{execution}:1"],
            "states:StopExecution": [f"{execution}/Ranks:1"],
            "s3:GetObject": [f"{bucket}/results/run-1/ranks.json"],
        },
        "ServerStartRole": {
            "secretsmanager:GetSecretValue": [outputs["ServerSecretArn"]],
            "ecr:BatchGetImage": [f"{images}server"],
            "logs:PutLogEvents": [f"{logs}/server:log-stream:server/server/1"],
        },
        **dict.fromkeys(("InitRole", "InferRole", "SummarizeRole", "CheckRole"), stream),
    }
    may_not = {
        "MachineRole": {
            "lambda:InvokeFunction": [f"{function}check"],
            "states:StartExecution": [f"{machine}-2"],
            "s3:GetObject": [f"{bucket}/results/run-1/0.json", f"{bucket}/datasets/ranks.json"],
        },
        "ServerStartRole": {
            "secretsmanager:GetSecretValue": [outputs["KeyArn"]],
            "ecr:BatchGetImage": [f"{images}worker"],
        },
    }
    assert simulated(aws, may) == {"allowed"}
    assert simulated(aws, may_not) == {"implicitDeny"}


def simulated(aws: LocalAws, cases: dict[str, dict[str, list[str]]]) -> set[str]:
    """What IAM's simulator says to all of these: {role: {action: resources}}."""
    verdicts: set[str] = set()
    with aws.client("iam") as iam, aws.client("cloudformation") as cloudformation:
        for role, actions in cases.items():
            made = cloudformation.describe_stack_resource(
                StackName="cosmic", LogicalResourceId=role
            )
            name = made["StackResourceDetail"]["PhysicalResourceId"]
            arn = iam.get_role(RoleName=name)["Role"]["Arn"]
            for action, resources in actions.items():
                answer = iam.simulate_principal_policy(
                    PolicySourceArn=arn, ActionNames=[action], ResourceArns=resources
                )
                verdicts |= {result["EvalDecision"] for result in answer["EvaluationResults"]}
    return verdicts


def test_with_a_public_address_there_is_no_load_balancer(aws: LocalAws) -> None:
    outputs = deploy(aws, "direct", "Exposure=PublicAddress", "AllowedCidr=198.51.100.0/24")
    assert "RendezvousEndpoint" not in outputs
    with aws.client("cloudformation") as cloudformation:
        made = cloudformation.describe_stack_resources(StackName="direct")["StackResources"]
    kinds = {resource["ResourceType"] for resource in made}
    assert not [kind for kind in kinds if "LoadBalancing" in kind]
    group = next(r for r in made if r["LogicalResourceId"] == "ServerGroup")
    with aws.client("ec2") as ec2:
        described = ec2.describe_security_groups(GroupIds=[group["PhysicalResourceId"]])
    opened = described["SecurityGroups"][0]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in opened] == [(10000, 10000)]
    assert opened[0]["IpRanges"][0]["CidrIp"] == "198.51.100.0/24"
