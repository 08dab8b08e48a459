"""Descriptions of clusters that cannot be meant, as `mgpp cluster render --set` gives them."""

from typing import Any

from launch.cluster.description import describe_cluster
from tests.hostile.case import Case

BASE = ""


def read(case: Case) -> Any:
    """Describe a cluster of one node."""
    return describe_cluster({"name": "small", "nodes": 1, "memory_gib": 64}, case.overrides)


LINES = [
    (
        "open-list",
        "partition=[",
        "--set partition=[: not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"<unicode string>\", line 1, column 2: [ ^",
    ),
    (
        "open-mapping",
        "partition={",
        "--set partition={: not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"<unicode string>\", line 1, column 2: { ^",
    ),
    (
        "open-quote",
        "partition='a",
        '--set partition=\'a: not valid YAML: while scanning a quoted scalar in "<unicode string>", line 1, column 1: \'a ^ found unexpected end of stream in "<unicode string>", line 1, column 3: \'a ^',
    ),
    ("list-for-text", "partition=[]", "partition: input should be a valid string, got []"),
    ("number-for-text", "partition=7", "partition: input should be a valid string, got 7"),
    ("boolean-for-text", "partition=on", "partition: input should be a valid string, got True"),
    (
        "null-byte",
        "partition=a\x00",
        '--set partition=a\\x00: not valid YAML: unacceptable character #x0000: special characters are not allowed in "<unicode string>", position 1',
    ),
    (
        "two-documents",
        "partition=a\n---\nb",
        '--set partition=a\\n---\\nb: not valid YAML: expected a single document in the stream in "<unicode string>", line 1, column 1: a ^ but found another document in "<unicode string>", line 2, column 1: --- ^',
    ),
    (
        "alias",
        "partition=*a",
        "--set partition=*a: not valid YAML: found undefined alias 'a' in \"<unicode string>\", line 1, column 1: *a ^",
    ),
    (
        "object",
        "setup=!!python/object/apply:os.system ['true']",
        "--set setup=!!python/object/apply:os.system ['true']: line 1: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
    ),
    (
        "base-60-time",
        "time_limit=24:00:00",
        "--set time_limit=24:00:00: line 1: 24:00:00 without quotes is a number in base 60; write text as '24:00:00', and a number in base 10",
    ),
    (
        "words-for-time",
        "time_limit=a day",
        "time_limit: string should match pattern '^[0-9:-]+$', got 'a day'",
    ),
    (
        "octal-port",
        "port=0637",
        "--set port=0637: line 1: 0637 without quotes is a number in base 8; write text as '0637', and a number in base 10",
    ),
    ("boolean-port", "port=true", "port: input should be a valid integer, got True"),
    (
        "quoted-port",
        "port='6379'",
        "port: input should be a valid integer, got '6379'; a number in quotes is text",
    ),
    ("full-width-port", "port=６３７９", "port: input should be a valid integer, got '６３７９'"),
    (
        "huge-port",
        "port=1e300",
        "port: input should be a valid integer, got '1e300'; a number in quotes is text",
    ),
    ("no-port", "port=65536", "port: input should be less than or equal to 65535, got 65536"),
    ("no-nodes", "nodes=0", "nodes: input should be greater than or equal to 1, got 0"),
    ("fraction-of-a-node", "nodes=1.5", "nodes: input should be a valid integer, got 1.5"),
    (
        "negative-retries",
        "retries=-1",
        "retries: input should be greater than or equal to 0, got -1",
    ),
    (
        "huge-memory",
        "memory_gib=100000000000000000000",
        "memory_gib: must be below 2**63, got 100000000000000000000",
    ),
    (
        "more-shared-memory",
        "shared_memory_gib=65",
        "shared_memory_gib: must not exceed memory_gib, 64, got 65",
    ),
    (
        "quoted-gpus",
        "gpus_per_node='8'",
        "gpus_per_node: input should be a valid integer, got '8'; a number in quotes is text",
    ),
    ("word-for-boolean", "elastic=maybe", "elastic: input should be a valid boolean, got 'maybe'"),
    ("number-for-boolean", "elastic=1", "elastic: input should be a valid boolean, got 1"),
    ("text-for-list", "worker_ips=10.0.0.1", "worker_ips: must be a list, got '10.0.0.1'"),
    ("number-in-list", "worker_ips=[1]", "worker_ips.0: input should be a valid string, got 1"),
    ("mapping-for-text", "image={a: b}", "image: input should be a valid string"),
    ("null-name", "name=", "name: input should be a valid string, got None"),
    (
        "capital-name",
        "name=Small",
        "name: string should match pattern '^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$', got 'Small'",
    ),
    (
        "long-name",
        "name=" + "a" * 100,
        "name: string should match pattern '^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$', got 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'",
    ),
    ("other-provider", "provider=azure", "provider: input should be 'aws' or 'local', got 'azure'"),
    (
        "deep-list",
        f"worker_ips={'[' * 100}{']' * 100}",
        f"--set worker_ips={'[' * 100}{']' * 100}: nested more than 32 levels deep",
    ),
    (
        "very-deep-list",
        f"worker_ips={'[' * 20000}{']' * 20000}",
        f"--set worker_ips={'[' * 280}...: nested more than 32 levels deep",
    ),
    (
        "line-for-partition",
        'partition="gpu\\nrm -rf /"',
        "partition: must be names of partitions, of letters, digits, '.', '_', '+', '-', got 'gpu\\nrm -rf /'",
    ),
    (
        "option-for-user",
        "ssh_user=-oProxyCommand=id",
        "ssh_user: must be letters, digits, '.', '_' and '-', with no '.' or '-' first, got '-oProxyCommand=id'",
    ),
    (
        "command-for-address",
        "worker_ips=[10.0.0.1, $(id)]",
        "worker_ips.1: must be a host name or an address, got '$(id)'",
    ),
    (
        "options-for-image",
        "image=mgpp:1 --privileged",
        "image: must be an image's name, such as registry/mgpp:1, got 'mgpp:1 --privileged'",
    ),
    ("nothing-for-command", "install=' '", "install: must be a shell command, got ' '"),
    (
        "escape-for-command",
        'setup="echo \\x1b[2J"',
        "setup: must be text without control characters, got 'echo \\x1b[2J'",
    ),
    (
        "unknown-key",
        "partion=gpu",
        "--set partion=gpu: must be key=value; keys are name, nodes, gpus_per_node, cpus_per_node, memory_gib, shared_memory_gib, image, install, retries, elastic, claim, provider, region, instance_type, head_ip, worker_ips, ssh_user, gpu_type, partition, time_limit, setup, port",
    ),
    (
        "no-value",
        "partition",
        "--set partition: must be key=value; keys are name, nodes, gpus_per_node, cpus_per_node, memory_gib, shared_memory_gib, image, install, retries, elastic, claim, provider, region, instance_type, head_ip, worker_ips, ssh_user, gpu_type, partition, time_limit, setup, port",
    ),
    (
        "no-key",
        "=gpu",
        "--set =gpu: must be key=value; keys are name, nodes, gpus_per_node, cpus_per_node, memory_gib, shared_memory_gib, image, install, retries, elastic, claim, provider, region, instance_type, head_ip, worker_ips, ssh_user, gpu_type, partition, time_limit, setup, port",
    ),
    (
        "nothing",
        "",
        "--set : must be key=value; keys are name, nodes, gpus_per_node, cpus_per_node, memory_gib, shared_memory_gib, image, install, retries, elastic, claim, provider, region, instance_type, head_ip, worker_ips, ssh_user, gpu_type, partition, time_limit, setup, port",
    ),
]
CASES = [Case(name=name, overrides=(override,), line=line) for name, override, line in LINES]
