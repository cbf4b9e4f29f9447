//! Instance types: what a named size promises and what it takes from a host, and the catalogue of them.
//!
//! The catalogue is a data file that an owner may edit (`data/instance-types.toml` explains its columns). Parsing
//! refuses what it does not understand, with the line, the type and the field.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use toml::Spanned;

/// One instance type, such as `t3.micro`. CPU shares are in thousandths of one host CPU ("milli").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceType {
    /// `family.size`.
    pub name: String,
    /// The part before the dot; also the name of the family's cgroup.
    pub family: String,
    /// general, compute, memory, storage, accelerated or burstable.
    pub category: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The most CPU the instance ever gets, in milli-CPUs (`cpu.max`); 1000 × vcpus unless the type is limited.
    pub cpu_max_milli: u32,
    /// What placement takes from the host's CPU for it, in milli-CPUs: everything for a dedicated share, the
    /// baseline for a burstable type.
    pub cpu_claim_milli: u32,
    /// CPU credits earned per hour, in thousandths of a credit; `None` for types without credits.
    /// One credit is one vCPU at full speed for one minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credits_per_hour_milli: Option<u32>,
    /// GPUs; a host without them refuses the type.
    #[serde(default)]
    pub gpus: u32,
    /// Local instance-store disk in GB; a host without it refuses the type.
    #[serde(default)]
    pub instance_store_gb: u64,
}

impl InstanceType {
    /// The size: the part after the dot.
    pub fn size(&self) -> &str {
        self.name.split_once('.').map_or("", |(_, size)| size)
    }
}

/// The categories that a family may be of.
const CATEGORIES: [&str; 6] = ["general", "burstable", "compute", "memory", "storage", "accelerated"];
/// Most vCPUs that a type may promise: far above any host, low enough that no product of it overflows.
const MAX_VCPUS: u32 = 4096;
/// Most memory that a type may promise: 64 TiB.
const MAX_MEMORY_MIB: u64 = 64 << 20;
/// Least `cpu.max`: the kernel takes no quota below 1 ms in its period of 100 ms.
const MIN_CPU_MAX_MILLI: u32 = 10;

/// A catalogue file that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogueError {
    /// It is not TOML of the expected shape; the text names the line, the field and what is expected.
    #[error("the instance types cannot be read: {0}")]
    Syntax(String),
    /// A value is not allowed.
    #[error("instance types, line {line}: {name}: {problem}")]
    Value {
        /// Line in the file, from 1.
        line: usize,
        /// The type or the family.
        name: String,
        /// The field, its value and what is allowed.
        problem: String,
    },
    /// There is no type in it.
    #[error("the instance types are empty: expected at least one [family.NAME.sizes] with a SIZE in it")]
    Empty,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    family: BTreeMap<Spanned<String>, Family>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Family {
    category: Spanned<String>,
    sizes: BTreeMap<Spanned<String>, Size>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    vcpus: u32,
    memory_mib: u64,
    baseline_percent: Option<u32>,
    cpu_max_milli: Option<u32>,
    cpu_claim_milli: Option<u32>,
    #[serde(default)]
    gpus: u32,
    #[serde(default)]
    instance_store_gb: u64,
}

/// Every instance type that there is, by family in the order of the file, then by size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalogue {
    types: Vec<InstanceType>,
    by_name: BTreeMap<String, usize>,
}

impl Catalogue {
    /// Reads a catalogue file.
    ///
    /// # Errors
    /// [`CatalogueError`], with the line, the type and the field.
    pub fn parse(text: &str) -> Result<Self, CatalogueError> {
        let file: File = toml::from_str(text).map_err(|error| CatalogueError::Syntax(error.to_string()))?;
        let line_of = |at: usize| text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
        let mut families: Vec<_> = file.family.into_iter().collect();
        families.sort_by_key(|(name, _)| name.span().start);
        let mut types = Vec::new();
        for (family, Family { category, sizes }) in families {
            let refuse = |at: usize, problem: String| CatalogueError::Value {
                line: line_of(at),
                name: family.get_ref().clone(),
                problem,
            };
            if !is_name(family.get_ref()) {
                return Err(refuse(family.span().start, NAME_RULE.to_owned()));
            }
            if !CATEGORIES.contains(&category.get_ref().as_str()) {
                let problem =
                    format!("category is {:?}, allowed are {}", category.get_ref(), CATEGORIES.join(", "));
                return Err(refuse(category.span().start, problem));
            }
            let first = types.len();
            for (size, spec) in sizes {
                let line = line_of(size.span().start);
                let name = format!("{family}.{size}", family = family.get_ref(), size = size.get_ref());
                let instance_type = spec.into_type(&name, family.get_ref(), category.get_ref());
                types.push(
                    instance_type
                        .and_then(
                            |one| if is_name(size.get_ref()) { Ok(one) } else { Err(NAME_RULE.to_owned()) },
                        )
                        .map_err(|problem| CatalogueError::Value { line, name, problem })?,
                );
            }
            types[first..]
                .sort_by(|a, b| (a.vcpus, a.memory_mib, &a.name).cmp(&(b.vcpus, b.memory_mib, &b.name)));
        }
        if types.is_empty() {
            return Err(CatalogueError::Empty);
        }
        let by_name = types.iter().enumerate().map(|(at, one)| (one.name.clone(), at)).collect();
        Ok(Self { types, by_name })
    }

    /// The catalogue that Roost comes with.
    ///
    /// # Panics
    /// Never: a test parses it.
    pub fn builtin() -> Self {
        match Self::parse(include_str!("../data/instance-types.toml")) {
            Ok(catalogue) => catalogue,
            Err(error) => panic!("{error}"),
        }
    }

    /// The type of this name.
    pub fn get(&self, name: &str) -> Option<&InstanceType> {
        self.by_name.get(name).map(|at| &self.types[*at])
    }

    /// Every type, by family in the order of the file, then by size.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &InstanceType> {
        self.types.iter()
    }

    /// Every type of a family, smallest first; nothing for an unknown one.
    pub fn family<'a>(&'a self, family: &'a str) -> impl Iterator<Item = &'a InstanceType> {
        self.types.iter().filter(move |one| one.family == family)
    }
}

const NAME_RULE: &str = "a name is 1 to 32 characters of a-z, 0-9 and -, and begins with a letter or a digit";

/// Names become parts of file names (cgroups), so they are kept plain.
fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=32).contains(&text.len()) && text.bytes().all(|b| plain(b) || b == b'-') && plain(text.as_bytes()[0])
}

impl Size {
    fn into_type(self, name: &str, family: &str, category: &str) -> Result<InstanceType, String> {
        within("vcpus", u64::from(self.vcpus), 1, u64::from(MAX_VCPUS))?;
        within("memory_mib", self.memory_mib, 1, MAX_MEMORY_MIB)?;
        let whole = self.vcpus * 1000;
        let cpu_max_milli = self.cpu_max_milli.unwrap_or(whole);
        within("cpu_max_milli", cpu_max_milli.into(), MIN_CPU_MAX_MILLI.into(), whole.into())?;
        let (claim, credits) = match (self.baseline_percent, self.cpu_claim_milli) {
            (Some(_), Some(_)) => {
                return Err("baseline_percent and cpu_claim_milli exclude each other".to_owned());
            }
            (Some(percent), None) => {
                within("baseline_percent", percent.into(), 1, 100)?;
                // A percent of a vCPU is 10 milli-CPUs, and earns 0.6 credits (600 thousandths) an hour.
                (self.vcpus * percent * 10, Some(self.vcpus * percent * 600))
            }
            (None, claim) => (claim.unwrap_or(cpu_max_milli), None),
        };
        within("the CPU claim in milli-CPUs", claim.into(), 1, cpu_max_milli.into())?;
        if (category == "burstable") != credits.is_some() {
            return Err(format!(
                "baseline_percent must be there for category burstable and for no other (this is {category})"
            ));
        }
        Ok(InstanceType {
            name: name.to_owned(),
            family: family.to_owned(),
            category: category.to_owned(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            cpu_max_milli,
            cpu_claim_milli: claim,
            credits_per_hour_milli: credits,
            gpus: self.gpus,
            instance_store_gb: self.instance_store_gb,
        })
    }
}

fn within(field: &str, value: u64, least: u64, most: u64) -> Result<(), String> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!("{field} is {value}, allowed are {least} to {most}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_size(size: &str) -> Result<Catalogue, CatalogueError> {
        Catalogue::parse(&format!("[family.x1]\ncategory = \"general\"\n[family.x1.sizes]\na = {size}\n"))
    }

    #[test]
    fn the_builtin_catalogue_has_the_public_types_and_the_home_family() {
        let catalogue = Catalogue::builtin();
        assert_eq!(catalogue.iter().filter(|one| one.family != "home1").count(), 127);
        assert_eq!(catalogue.family("home1").count(), 6);
        let micro = catalogue.get("t3.micro").unwrap();
        assert_eq!((micro.vcpus, micro.memory_mib, micro.cpu_max_milli), (2, 1024, 2000));
        assert_eq!((micro.cpu_claim_milli, micro.credits_per_hour_milli), (200, Some(12_000)));
        let large = catalogue.get("m5.large").unwrap();
        assert_eq!((large.cpu_max_milli, large.cpu_claim_milli), (2000, 2000));
        assert_eq!(large.credits_per_hour_milli, None);
        let pico = catalogue.get("home1.pico").unwrap();
        assert_eq!((pico.memory_mib, pico.cpu_max_milli, pico.cpu_claim_milli), (64, 250, 100));
        assert_eq!(catalogue.get("g4dn.12xlarge").unwrap().gpus, 4);
        assert_eq!(catalogue.get("i3.large").unwrap().instance_store_gb, 475);
        assert!(catalogue.get("t3.giant").is_none());
    }

    #[test]
    fn types_come_by_family_and_grow_within_it() {
        let catalogue = Catalogue::builtin();
        let sizes: Vec<_> = catalogue.family("t3").map(InstanceType::size).collect();
        assert_eq!(sizes, ["nano", "micro", "small", "medium", "large", "xlarge", "2xlarge"]);
        assert_eq!(catalogue.iter().next().unwrap().name, "home1.pico");
        for one in catalogue.iter() {
            assert_eq!(one.name, format!("{}.{}", one.family, one.size()));
            assert!(one.cpu_claim_milli <= one.cpu_max_milli && one.cpu_max_milli <= one.vcpus * 1000);
        }
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_line_type_and_field() {
        for (size, expected) in [
            ("{ vcpus = 0, memory_mib = 1 }", "vcpus is 0, allowed are 1 to 4096"),
            ("{ vcpus = 1, memory_mib = 0 }", "memory_mib is 0"),
            (
                "{ vcpus = 1, memory_mib = 1, cpu_max_milli = 1001 }",
                "cpu_max_milli is 1001, allowed are 10 to 1000",
            ),
            (
                "{ vcpus = 1, memory_mib = 1, cpu_max_milli = 100, cpu_claim_milli = 101 }",
                "CPU claim in milli-CPUs is 101",
            ),
            (
                "{ vcpus = 1, memory_mib = 1, baseline_percent = 5 }",
                "baseline_percent must be there for category burstable",
            ),
            (
                "{ vcpus = 1, memory_mib = 1, baseline_percent = 5, cpu_claim_milli = 5 }",
                "exclude each other",
            ),
        ] {
            let error = parse_size(size).unwrap_err().to_string();
            assert!(
                error.contains("line 4") && error.contains("x1.a") && error.contains(expected),
                "{error}"
            );
        }
    }

    #[test]
    fn an_unknown_field_is_refused_by_name_and_line() {
        let error = parse_size("{ vcpus = 1, memory_mib = 1, vpcus = 2 }").unwrap_err().to_string();
        assert!(error.contains("vpcus") && error.contains("line 4"), "{error}");
    }

    #[test]
    fn names_that_could_leave_a_folder_are_refused() {
        for bad in ["..", "a/b", "", "A", "-a"] {
            let text = format!(
                "[family.{bad:?}]\ncategory = \"general\"\n[family.{bad:?}.sizes]\na = {{ vcpus = 1, memory_mib = 1 }}\n"
            );
            assert!(matches!(Catalogue::parse(&text), Err(CatalogueError::Value { .. })), "{bad}");
            let text = format!(
                "[family.x1]\ncategory = \"general\"\n[family.x1.sizes]\n{bad:?} = {{ vcpus = 1, memory_mib = 1 }}\n"
            );
            assert!(matches!(Catalogue::parse(&text), Err(CatalogueError::Value { .. })), "{bad}");
        }
    }

    #[test]
    fn an_empty_file_and_an_unknown_category_are_refused() {
        assert!(matches!(Catalogue::parse(""), Err(CatalogueError::Syntax(_))));
        assert_eq!(Catalogue::parse("family = {}"), Err(CatalogueError::Empty));
        let text = "[family.x1]\ncategory = \"fast\"\n[family.x1.sizes]\na = { vcpus = 1, memory_mib = 1 }\n";
        let error = Catalogue::parse(text).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("\"fast\""), "{error}");
    }
}
