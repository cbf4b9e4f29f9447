//! Between rows of the database and rows of the store.

use crate::error::StoreError;
use roost_types::Micros;
use rusqlite::types::{Type, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::str::FromStr;

/// A count as SQLite's integer. Counts here are far below 2⁶³; one above is stored as the largest there is.
pub fn int(count: u64) -> Value {
    Value::Integer(i64::try_from(count).unwrap_or(i64::MAX))
}

pub fn text(value: impl Display) -> Value {
    Value::Text(value.to_string())
}

pub fn time(at: Micros) -> Value {
    Value::Integer(at.0)
}

pub fn flag(on: bool) -> Value {
    Value::Integer(i64::from(on))
}

pub fn maybe<T>(value: Option<T>, encode: impl FnOnce(T) -> Value) -> Value {
    value.map_or(Value::Null, encode)
}

pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Value, StoreError> {
    serde_json::to_string(value)
        .map(Value::Text)
        .map_err(|error| StoreError::Unreadable { what: "value to store".into(), detail: error.to_string() })
}

/// Reads the columns of one row from left to right.
pub struct Cursor<'r> {
    row: &'r rusqlite::Row<'r>,
    at: usize,
}

type Read<T> = Result<T, rusqlite::Error>;

impl<'r> Cursor<'r> {
    pub fn new(row: &'r rusqlite::Row<'r>) -> Self {
        Self { row, at: 0 }
    }

    fn next(&mut self) -> usize {
        self.at += 1;
        self.at - 1
    }

    fn bad(at: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
        rusqlite::Error::FromSqlConversionFailure(at, Type::Text, Box::new(error))
    }

    pub fn raw<T: rusqlite::types::FromSql>(&mut self) -> Read<T> {
        let at = self.next();
        self.row.get(at)
    }

    pub fn time(&mut self) -> Read<Micros> {
        self.raw().map(Micros)
    }

    pub fn maybe_time(&mut self) -> Read<Option<Micros>> {
        Ok(self.raw::<Option<i64>>()?.map(Micros))
    }

    /// A count of any unsigned type.
    pub fn count<T: TryFrom<i64>>(&mut self) -> Read<T> {
        let at = self.next();
        let value: i64 = self.row.get(at)?;
        T::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(at, value))
    }

    pub fn parse<T>(&mut self) -> Read<T>
    where
        T: FromStr,
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        let at = self.next();
        self.row.get_ref(at)?.as_str()?.parse().map_err(|error| Self::bad(at, error))
    }

    pub fn maybe_parse<T>(&mut self) -> Read<Option<T>>
    where
        T: FromStr,
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        let at = self.next();
        let value: Option<String> = self.row.get(at)?;
        value.map(|value| value.parse().map_err(|error| Self::bad(at, error))).transpose()
    }

    pub fn json<T: DeserializeOwned>(&mut self) -> Read<T> {
        let at = self.next();
        serde_json::from_str(self.row.get_ref(at)?.as_str()?).map_err(|error| Self::bad(at, error))
    }

    pub fn maybe_json<T: DeserializeOwned>(&mut self) -> Read<Option<T>> {
        let at = self.next();
        let value: Option<String> = self.row.get(at)?;
        value.map(|value| serde_json::from_str(&value).map_err(|error| Self::bad(at, error))).transpose()
    }
}
