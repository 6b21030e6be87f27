"""The cluster file for AWS, as Ray uses it, against a cloud that is made up."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

REGION, WORKERS = "us-west-2", 3


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An account without anything in it."""
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(aws, "time", SimpleNamespace(sleep=lambda _: None))  # until a role is known in all of AWS
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield boto3.client("ec2", REGION)


def launch(edited: dict[str, Any]) -> Any:
    """Have Ray make what `ray up` makes before it connects to the head, and as many workers. Returns the provider."""
    cluster = prepare_config(edited)
    validate_config(cluster)
    cluster = aws.bootstrap_aws(cluster)
    provider = _get_node_provider(cluster["provider"], cluster["cluster_name"])
    for kind, more in [("head", cluster["head_node"])] + [("worker", {})] * WORKERS:
        tags = {"ray-node-type": kind, "ray-user-node-type": kind, "ray-node-name": f"ray-dnn-{kind}"}
        provider.create_node(cluster["available_node_types"][kind]["node_config"] | more, tags, 1)
    return provider


def test_ray_starts_the_head_on_demand_and_workers_as_spot_machines(cloud: Any) -> None:
    cluster = yaml.safe_load(Path("cluster.yaml").read_text())
    profile = boto3.client("iam").create_instance_profile(InstanceProfileName="training")["InstanceProfile"]
    for kind in cluster["available_node_types"].values():
        kind["node_config"]["IamInstanceProfile"] = {"Arn": profile["Arn"]}  # as the file says
    provider = launch(cluster)
    there = [i for r in cloud.describe_instances()["Reservations"] for i in r["Instances"]]
    assert Counter(i.get("InstanceLifecycle") for i in there) == {None: 1, "spot": WORKERS}
    assert {i["Placement"]["AvailabilityZone"] for i in there} == {cluster["provider"]["availability_zone"]}
    assert {i["InstanceType"] for i in there} == {"m7i.2xlarge"}
    assert {i["IamInstanceProfile"]["Arn"] for i in there} == {profile["Arn"]}
    assert all(len(i["BlockDeviceMappings"]) == 1 for i in there)

    (group,) = {g["GroupId"] for i in there for g in i["SecurityGroups"]}
    (about,) = cloud.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    opened = {p.get("ToPort") for p in about["IpPermissions"] if p["IpRanges"]}
    assert opened == {22}  # to the world; everything among the machines

    assert os.listdir(Path.home() / ".ssh") == [f"ray-autoscaler_{REGION}.pem"]
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []
