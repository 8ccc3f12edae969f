"""The profile that `aws configure` writes: keys, region and endpoint of S3 where the environment does not have them."""

import os
from collections.abc import Mapping
from configparser import ConfigParser, Error
from pathlib import Path
from typing import Any

from fedcli.errors import ConfigError, RequirementError

_CREDENTIALS = ("aws_access_key_id", "credential_", "role_arn", "sso_", "web_identity_token_file")
"""What settings of a profile begin with that say where its credentials come from."""


def profile_options() -> dict[str, Any]:
    """Return S3's settings from the files that `aws configure` writes, where the environment does not have them."""
    settings = _settings()
    told: dict[str, Any] = {}
    if not ({"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys()):
        told["region"] = settings.get("region", "us-east-1")
    if "AWS_ENDPOINT_URL" not in os.environ and "endpoint_url" in settings:
        told["endpoint"] = settings["endpoint_url"]
    if "AWS_ACCESS_KEY_ID" in os.environ or not any(key.startswith(_CREDENTIALS) for key in settings):
        return told
    if {"aws_access_key_id", "aws_secret_access_key"} <= settings.keys():
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        told |= {name: settings[key] for name, key in names.items()}
        return told | ({"session_token": token} if (token := settings.get("aws_session_token")) else {})
    return told | {"credential_provider": _boto3_credentials()}


def _boto3_credentials() -> Any:
    """Return what gets the credentials of a profile that has no keys: roles, SSO, processes."""
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError as error:
        raise RequirementError(
            f"the AWS profile {_profile_name()} has no keys of its own, and boto3, which gets its, is not installed",
            hint="Install it with `pip install boto3`; or export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ) from error
    return Boto3CredentialProvider(Session())


def _profile_name() -> str:
    return os.environ.get("AWS_PROFILE") or "default"


def _settings() -> Mapping[str, str]:
    """Return what ~/.aws/config and ~/.aws/credentials say of the profile."""
    found: dict[str, str] = {}
    name = _profile_name()
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        path = Path(os.environ.get(variable) or Path("~/.aws", file)).expanduser()
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (Error, UnicodeDecodeError) as error:
            hint = "Mend it, or name another one."
            raise ConfigError(f"{path} cannot be read: {type(error).__name__}", hint=hint) from None
        found |= parser[section] if parser.has_section(section) else {}
    if "AWS_PROFILE" in os.environ and not found:
        hint = "Name one of ~/.aws/config or ~/.aws/credentials in $AWS_PROFILE."
        raise ConfigError(f"there is no AWS profile {name}", hint=hint)
    return found
