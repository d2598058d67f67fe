"""How an address is told, and what is said of a host that cannot be reached."""

import pytest

from concept_trak.network import without_credentials


@pytest.mark.parametrize(
    "address, told",
    [
        ("s3://AKIAX:s3cr3t@bucket/prefix", "s3://bucket/prefix"),
        ("s3://AKIAX:s3/cr3t+s3=@bucket/prefix", "s3://bucket/prefix"),
        ("https://s3cr3t@host:8080/path", "https://host:8080/path"),
        ("http://me:s3@cr3t@host/a", "http://host/a"),
        ("http://me:s3%40cr3t@[::1]:80/a", "http://[::1]:80/a"),
        ("https://host/x?X-Amz-Signature=s3cr3t&a=1#s3cr3t", "https://host/x"),
        (
            "abfs://box@account.dfs.core.windows.net/x?sig=s3cr3t",
            "abfs://box@account.dfs.core.windows.net/x",
        ),
        ("hdfs+x://me:s3cr3t@host", "hdfs+x://host"),
        (
            "cannot list 's3://a:s3cr3t@b/c': GET https://b/?token=s3cr3t failed; set GRAD_DIR",
            "cannot list 's3://b/c': GET https://b/ failed; set GRAD_DIR",
        ),
        ("http://host:8080/a@v1", "http://host:8080/a@v1"),
        ("s3://bucket/run@2/rows", "s3://bucket/run@2/rows"),
        ("no address: me@home, a?b", "no address: me@home, a?b"),
    ],
)
def test_an_address_is_told_without_what_opens_it(address, told):
    found = without_credentials(address)
    assert "s3cr3t" not in found and without_credentials(found) == found
    assert found == told
