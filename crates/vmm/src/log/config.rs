//! What the log is configured with, in the shape of Firecracker's `PUT /logger`.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// Which lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[repr(u8)]
pub enum Level {
    /// None.
    Off,
    /// What ends the machine.
    Error,
    /// What goes wrong while the machine goes on.
    Warning,
    /// What happens to the machine.
    Info,
    /// Requests of the API and their answers.
    Debug,
    /// As Debug.
    Trace,
}

impl Level {
    const ALL: [(&'static str, Self); 6] = [
        ("Off", Self::Off),
        ("Error", Self::Error),
        ("Warning", Self::Warning),
        ("Info", Self::Info),
        ("Debug", Self::Debug),
        ("Trace", Self::Trace),
    ];
    const NAMES: [&'static str; 6] = ["Off", "Error", "Warning", "Info", "Debug", "Trace"];

    /// The level of this name, in capitals or not.
    ///
    /// # Errors
    /// What is there instead.
    pub fn parse(name: &str) -> Result<Self, String> {
        // Firecracker takes both.
        let name = if name.eq_ignore_ascii_case("warn") { "Warning" } else { name };
        let found = Self::ALL.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found
            .map(|(_, level)| *level)
            .ok_or_else(|| format!("level {name:?} is none of {}", Self::NAMES.join(", ")))
    }

    /// As it stands in a line.
    #[must_use]
    pub const fn in_line(self) -> &'static str {
        match self {
            Self::Off => "OFF",
            Self::Error => "ERROR",
            Self::Warning => "WARN",
            Self::Info => "INFO",
            Self::Debug => "DEBUG",
            Self::Trace => "TRACE",
        }
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::parse(&name).map_err(|_| D::Error::unknown_variant(&name, &Self::NAMES))
    }
}

/// The log. What is left out stays as it is, or is `Info`, false, everything, and stderr.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// A file that lines are appended to, or a named pipe. Left out: stderr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
    /// Which lines are written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Each line has its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Each line has the place in the program that wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines of this module of the program, and of those below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

impl LoggerConfig {
    /// The log after a change.
    #[must_use]
    pub fn with(self, change: Self) -> Self {
        Self {
            log_path: change.log_path.or(self.log_path),
            level: change.level.or(self.level),
            show_level: change.show_level.or(self.show_level),
            show_log_origin: change.show_log_origin.or(self.show_log_origin),
            module: change.module.or(self.module),
        }
    }

    /// Whether a line of this level from this module is written.
    #[must_use]
    pub fn takes(&self, level: Level, module: &str) -> bool {
        let wanted = self.module.as_deref().unwrap_or_default();
        let wanted = wanted.strip_prefix("roost_vmm").unwrap_or(wanted).trim_start_matches("::");
        level <= self.level.unwrap_or(Level::Info) && module.starts_with(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_their_names_in_any_letters() {
        for (text, level) in [("error", Level::Error), ("WARNING", Level::Warning), ("Warn", Level::Warning)]
        {
            assert_eq!(serde_json::from_str::<Level>(&format!("{text:?}")).unwrap(), level);
        }
        for (name, level) in Level::ALL {
            assert_eq!(Level::parse(name), Ok(level));
            assert_eq!(serde_json::to_string(&level).unwrap(), format!("{name:?}"));
        }
        assert!(Level::parse("loud").unwrap_err().contains("Warning"));
    }

    #[test]
    fn lines_are_taken_by_level_and_module() {
        let config = |text: &str| serde_json::from_str::<LoggerConfig>(text).unwrap();
        assert!(config("{}").takes(Level::Info, "main") && !config("{}").takes(Level::Debug, "main"));
        assert!(!config(r#"{"level":"Off"}"#).takes(Level::Error, "main"));
        for module in ["devices::virtio", "roost_vmm::devices::virtio::block"] {
            let config = config(&format!("{{\"module\":{module:?}}}"));
            assert!(
                config.takes(Level::Error, "devices::virtio::block") && !config.takes(Level::Error, "api")
            );
        }
        let before = config(r#"{"log_path":"a","level":"Debug"}"#);
        let after = before.with(config(r#"{"log_path":"b","show_level":true}"#));
        assert_eq!(after, config(r#"{"log_path":"b","level":"Debug","show_level":true}"#));
    }
}
