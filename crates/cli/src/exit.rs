//! Exit codes: one per class of outcome. `docs/cli.md` has the same table.

/// Everything went well.
pub const OK: u8 = 0;
/// A fault of ours, here or in the controller.
pub const INTERNAL: u8 = 1;
/// The command line or the configuration cannot be understood.
pub const USAGE: u8 = 2;
/// A parameter's value is not allowed.
pub const PARAMETER: u8 = 3;
/// Not signed, wrongly signed, or not allowed.
pub const AUTH: u8 = 4;
/// What was named does not exist.
pub const NOT_FOUND: u8 = 5;
/// The state of a resource forbids it, or it exists already.
pub const STATE: u8 = 6;
/// No room, a limit, or a type that cannot run here.
pub const CAPACITY: u8 = 7;
/// Something does not answer, or did not get there in time.
pub const UNAVAILABLE: u8 = 8;
/// `doctor`: use the virtual host.
pub const DOCTOR_VIRTUAL_HOST: u8 = 10;
/// `doctor`: neither this machine nor a virtual host on it will do.
pub const DOCTOR_REFUSE: u8 = 11;
/// Ended by Ctrl-C or SIGTERM.
pub const INTERRUPTED: u8 = 130;

/// Code, name and meaning of each class.
pub const TABLE: &[(u8, &str, &str)] = &[
    (OK, "ok", "done, or `launch --dry-run` would have succeeded"),
    (INTERNAL, "internal", "a fault of ours, here or in the controller"),
    (USAGE, "usage", "the command line or the configuration cannot be understood"),
    (PARAMETER, "parameter", "a parameter's value is not allowed, or a file given cannot be used"),
    (AUTH, "auth", "no profile, a wrong signature, or not allowed"),
    (NOT_FOUND, "not found", "the instance, image, key pair, account or type does not exist"),
    (STATE, "state", "the state of a resource forbids it, or the name is taken"),
    (CAPACITY, "capacity", "no room, a limit, or a type that cannot run here"),
    (UNAVAILABLE, "unavailable", "the controller or a host does not answer, or --timeout passed"),
    (DOCTOR_VIRTUAL_HOST, "virtual host", "`doctor` only: this machine should use the virtual host"),
    (DOCTOR_REFUSE, "refuse", "`doctor` only: neither this machine nor a virtual host on it will do"),
    (INTERRUPTED, "interrupted", "Ctrl-C or SIGTERM; what the controller accepted goes on"),
];

/// The table as text, for `roost help exit-codes`.
pub fn text() -> String {
    let mut text = String::new();
    for (code, name, meaning) in TABLE {
        text.push_str(&format!("{code:>5}  {name:<13} {meaning}\n"));
    }
    text.push_str(
        "\nssh ends with the exit code of the remote command, or with 255 where ssh itself failed.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use roost_types::ErrorCode;

    #[test]
    fn every_error_code_of_the_api_ends_in_a_documented_exit_code() {
        for code in ErrorCode::ALL {
            assert!(TABLE.iter().any(|(known, _, _)| *known == code.exit_code()), "{code}");
        }
    }

    #[test]
    fn no_exit_code_means_two_things() {
        let mut codes: Vec<u8> = TABLE.iter().map(|(code, _, _)| *code).collect();
        codes.dedup();
        assert_eq!(codes.len(), TABLE.len());
        assert!(codes.is_sorted());
    }
}
